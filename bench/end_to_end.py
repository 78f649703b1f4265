"""End to end: the same training with torch's optimizer and with pysmooth's, same seed and data.

An optimizer that is twice as fast may change a training step by one per cent. This part says by how
much, beside the kernels' own figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import pysmooth

from . import training
from .training import Training

BLOCK = 10  # steps by one side before the other has its turn


class _Side:
    """One of the two trainings: a model, a step, and the times of each."""

    def __init__(self, spec: Training, make: Callable[[nn.Module], Callable[[], object]]) -> None:
        self.spec = spec
        self.model = spec.make_model()
        self.update = make(self.model)
        self.losses: list[float] = []
        self.total: list[float] = []
        self.optimizer: list[float] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x, y = self.spec.batch(len(self.losses))
            start = time.perf_counter()
            self.model.zero_grad()
            loss = self.spec.loss(self.model, x, y)
            loss.backward()  # type: ignore[no-untyped-call]
            middle = time.perf_counter()
            self.update()
            end = time.perf_counter()
            self.losses.append(loss.item())
            self.total.append(end - start)
            self.optimizer.append(end - middle)

    def seconds_to(self, loss: float) -> float:
        """Seconds of training until the mean of a block's losses is as low as this."""
        seconds = 0.0
        for i in range(0, len(self.losses), BLOCK):
            seconds += sum(self.total[i : i + BLOCK])
            if statistics.mean(self.losses[i : i + BLOCK]) <= loss:
                break
        return seconds

    def figures(self) -> dict[str, float]:
        total, share = self.total[BLOCK:], self.optimizer[BLOCK:]  # the first block warms up
        return {
            "steps_per_s": 1 / statistics.median(total),
            "optimizer_ms": statistics.median(share) * 1e3,
            "optimizer_share": statistics.median(o / t for o, t in zip(share, total, strict=True)),
        }


def _last(side: _Side) -> float:
    """The mean of the last block's losses."""
    return statistics.mean(side.losses[-BLOCK:])


def _torch_update(spec: Training) -> Callable[[nn.Module], Callable[[], object]]:
    def make(model: nn.Module) -> Callable[[], object]:
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=spec.lr, momentum=spec.momentum, fused=True)

        def update() -> None:
            clip_grad_norm_(params, spec.max_norm)
            optimizer.step()

        return update

    return make


def run(spec: Training, seconds: float) -> dict[str, object]:
    """Trains both sides in turns, for about this long; returns figures, losses and a verdict."""
    backend = ""

    def ours(model: nn.Module) -> Callable[[], object]:
        nonlocal backend
        optimizer = pysmooth.ClipSGD(
            model.parameters(), spec.lr, momentum=spec.momentum, max_norm=spec.max_norm
        )
        backend = optimizer.resolved_backend
        return optimizer.step

    theirs, mine = _Side(spec, _torch_update(spec)), _Side(spec, ours)
    order = [theirs, mine]
    began = time.perf_counter()
    while len(mine.losses) < 4 * BLOCK or time.perf_counter() - began < seconds:
        for side in order:
            side.run(BLOCK)
        order.reverse()  # A B, B A: whoever goes second goes first next
    torch_figures, our_figures = theirs.figures(), mine.figures()
    speedup = torch_figures["optimizer_ms"] / our_figures["optimizer_ms"]
    gain = our_figures["steps_per_s"] / torch_figures["steps_per_s"]
    target = max(_last(theirs), _last(mine))
    difference = max(abs(a - b) for a, b in zip(theirs.losses, mine.losses, strict=True))
    return {
        "name": spec.name,
        "description": spec.description,
        "parameters": sum(p.numel() for p in mine.model.parameters()),
        "tensors": len(list(mine.model.parameters())),
        "steps": len(mine.losses),
        "backend": backend,
        "torch": torch_figures,
        "pysmooth": our_figures,
        "optimizer_speedup": speedup,
        "end_to_end_speedup": gain,
        "reached": {
            "loss": target,
            "torch": theirs.seconds_to(target),
            "pysmooth": mine.seconds_to(target),
        },
        "losses_torch": theirs.losses,
        "losses_pysmooth": mine.losses,
        "max_loss_difference": difference,
        "verdict": verdict(torch_figures["optimizer_share"], speedup, gain),
    }


def verdict(share: float, speedup: float, gain: float) -> str:
    """What the figures mean for someone who trains this model."""
    could = 1 / (1 - share + share / speedup) if speedup > 0 else 1.0
    size = (
        "not there"
        if gain < 0.995
        else "small"
        if gain < 1.05
        else "noticeable"
        if gain < 1.3
        else "large"
    )
    return (
        f"The end-to-end gain is {size} ({gain:.2f}x): clip and optimizer are {share:.1%} of "
        f"torch's step, and making them {speedup:.1f}x faster can give {could:.2f}x."
    )


def run_all(seconds: float, progress: Callable[[str], None]) -> list[dict[str, object]]:
    """Both trainings, sharing the time."""
    results = []
    for make in (training.gpt, training.convnet):
        spec = make()
        progress(f"training: {spec.name}")
        results.append(run(spec, seconds / 2))
    return results
