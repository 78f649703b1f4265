"""How far the numbers are from float64, and how far the rival's are.

Every contestant gets the same recorded gradients: those of a float64 run of a small regression, so
they neither blow up nor vanish, and their errors do not feed back.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pysmooth

SHAPES = [(64, 33), (257,), (), (16, 8, 3, 3)]
CHECKPOINTS = (1, 100, 1000)


def ulp_error(actual: Tensor, truth: Tensor, before: Tensor) -> float:
    """Largest error in units of the last place of max(|old parameter|, |update|), float32."""
    scale = torch.maximum(before.abs(), (truth - before).abs()).clamp(min=2.0**-126)
    spacing = torch.exp2(torch.floor(torch.log2(scale)) - 23)
    return float(((actual.double() - truth).abs() / spacing).max())


def relative_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """||actual - truth|| / ||truth|| over all tensors."""
    square = sum(float((a.double() - t).square().sum()) for a, t in zip(actual, truth, strict=True))
    return float((square / sum(float(t.square().sum()) for t in truth)) ** 0.5)


class _Oracle:
    """Clipped momentum SGD written out in float64, independent of the library's own code."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float, max_norm: float) -> None:
        self.params = [p.detach().double().clone() for p in params]
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.lr, self.momentum, self.max_norm = lr, momentum, max_norm

    def step(self, grads: list[Tensor]) -> None:
        norm = torch.sqrt(sum((g.double().square().sum() for g in grads), torch.zeros(())))
        coef = min(1.0, self.max_norm / (float(norm) + 1e-6))
        for p, g, m in zip(self.params, grads, self.buffers, strict=True):
            m.mul_(self.momentum).add_(coef * g.double())
            p.sub_(self.lr * m)


def compare(device: str = "cpu", steps: tuple[int, ...] = CHECKPOINTS) -> list[dict[str, object]]:
    """Errors of pysmooth's and torch's fused step after so many steps; one dict per checkpoint."""
    lr, momentum, max_norm = 1e-2, 0.9, 5.0
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in SHAPES]
    target = [torch.randn(s, generator=generator).double() for s in SHAPES]
    ours = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    theirs = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    oracle = _Oracle(start, lr, momentum, max_norm)
    mine = pysmooth.ClipSGD(ours, lr, momentum=momentum, max_norm=max_norm)
    rival = torch.optim.SGD(theirs, lr=lr, momentum=momentum, fused=True)

    rows: list[dict[str, object]] = []
    worst = {"pysmooth": 0.0, "torch fused": 0.0}
    for step in range(1, max(steps) + 1):
        noise = [torch.randn(s, generator=generator) for s in SHAPES]
        exact = [
            (p - t + n.double()).float()
            for p, t, n in zip(oracle.params, target, noise, strict=True)
        ]
        # One-step error, from identical states: the oracle starts each step where they are.
        for name, params, run in (("pysmooth", ours, mine.step), ("torch fused", theirs, None)):
            before = [p.detach().cpu().double() for p in params]
            for p, g in zip(params, exact, strict=True):
                p.grad = g.to(device, copy=True)
            buffers = _buffers(mine if name == "pysmooth" else rival, params)
            if run is not None:
                run()
            else:
                torch.nn.utils.clip_grad_norm_(theirs, max_norm)
                rival.step()
            local = _Oracle([], lr, momentum, max_norm)
            local.params = [b.clone() for b in before]
            local.buffers = buffers
            local.step(exact)
            for p, t, b in zip(params, local.params, before, strict=True):
                worst[name] = max(worst[name], ulp_error(p.detach().cpu(), t, b))
        oracle.step(exact)
        if step in steps:
            rows.append(
                {
                    "steps": step,
                    "pysmooth_max_ulp": worst["pysmooth"],
                    "torch_max_ulp": worst["torch fused"],
                    "pysmooth_relative_error": relative_error(
                        [p.detach().cpu() for p in ours], oracle.params
                    ),
                    "torch_relative_error": relative_error(
                        [p.detach().cpu() for p in theirs], oracle.params
                    ),
                }
            )
    return rows


def _buffers(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[Tensor]:
    found = []
    for p in params:
        buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        found.append(
            torch.zeros(p.shape, dtype=torch.float64)
            if buffer is None
            else buffer.detach().cpu().double().clone()
        )
    return found
