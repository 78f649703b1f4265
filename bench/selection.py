"""How often a top-k selection has to look a second time: on gradients of a training, and on others.

The step finds the k largest among candidates that a sample suggests. The result is exact whatever
the sample was; what a bad one costs is another pass over the values. Gradients with few distinct
sizes, or with all that is large in one place, are the hard ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pysmooth

from .training import Training, gpt

RATIO = 0.01
STEPS = 12
SIZE = 1 << 20


def recorded(training: Training, *, skip: int = 10, steps: int = STEPS) -> list[list[Tensor]]:
    """Gradients of consecutive training steps, after the first few."""
    model = training.make_model()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, training.lr, momentum=training.momentum)
    rows = []
    for step in range(skip + steps):
        x, y = training.batch(step)
        optimizer.zero_grad()
        torch.autograd.backward(training.loss(model, x, y))
        torch.nn.utils.clip_grad_norm_(params, training.max_norm)
        if step >= skip:
            rows.append([p.grad.clone() for p in params if p.grad is not None])
        optimizer.step()
    return rows


def adversarial() -> Iterator[tuple[str, list[list[Tensor]]]]:
    """Names and gradients, made to mislead a sample."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(SIZE, generator=generator)

    def heavy() -> Tensor:
        return normal() / normal().abs().clamp(min=1e-6)

    def block() -> Tensor:
        x = 1e-3 * normal()
        at = int(torch.randint(SIZE - SIZE // 50, (), generator=generator))
        x[at : at + SIZE // 50] *= 1e3
        return x

    makes: dict[str, Callable[[], Tensor]] = {
        "normal": normal,
        "Cauchy": heavy,
        "sorted": lambda: normal().sort().values,
        "2 % large, in one place": block,
        "all of one size": lambda: torch.sign(normal()),
        "three sizes": lambda: torch.randint(-3, 4, (SIZE,), generator=generator).float(),
        "99.9 % zeros": lambda: normal() * (torch.rand(SIZE, generator=generator) < 1e-3),
        "one value, the rest zeros": lambda: torch.eye(1, SIZE)[0],
    }
    for name, make in makes.items():
        yield name, [[make()] for _ in range(STEPS)]


def look(name: str, rows: list[list[Tensor]]) -> dict[str, object]:
    """EFSGD with top-k over the gradients; selections, second looks, time per million elements."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in rows[0]]
    optimizer = pysmooth.EFSGD(params, 0.1, pysmooth.TopK(ratio=RATIO), nonfinite="zero")
    times = []
    for row in rows:
        for p, g in zip(params, row, strict=True):
            p.grad = g
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    selections, second = optimizer.selections()
    millions = sum(p.numel() for p in params) / 1e6
    return {
        "gradients": name,
        "selections": selections,
        "second_looks": second,
        "ms_per_million": 1e3 * statistics.median(times[1:]) / millions,
    }


def measure() -> list[dict[str, object]]:
    """One row per kind of gradient; the training first."""
    training = gpt()
    cases = [(f"training: {training.name}", recorded(training)), *adversarial()]
    return [look(name, rows) for name, rows in cases]
