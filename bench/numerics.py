"""How far every method's numbers are from float64, and how far its rival's are.

All contestants get the same recorded gradients: those of a float64 run of a small regression, so
they neither blow up nor vanish, and errors do not feed back into them. Two measures:

- error of one step, in units of the last place of max(|old parameter|, |update|): each contestant
  against the same method in float64 that starts from its parameters and states. Taken in the first
  ten steps and then in every tenth.
- distance from a free float64 run of the rival's code, relative to its parameters. Here rounding
  may decide otherwise: which of two nearly equal values is among the k largest, which sign a number
  next to 0 has. Such a decision moves a coordinate by a whole step, in the rival as in pysmooth.

Methods that keep something in 16 bits have no float64 twin: only the distance says something there.
Methods that draw random numbers are left out: a rival draws others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pysmooth.optim._base import FusedOptimizer

from . import rivals
from .methods import DTYPES, METHODS, Method
from .problem import Problem, Step

SHAPES = [(64, 33), (257,), (), (16, 8, 3, 3)]
CHECKPOINTS = (1, 100, 1000)
LR, MAX_NORM = 1e-2, 5.0


def ulp_error(actual: Tensor, truth: Tensor, before: Tensor) -> float:
    """Largest error in units of the last place of max(|old parameter|, |update|), float32."""
    scale = torch.maximum(before.abs(), (truth - before).abs()).clamp(min=2.0**-126)
    spacing = torch.exp2(torch.floor(torch.log2(scale)) - 23)
    return float(((actual.double() - truth).abs() / spacing).max())


def relative_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """||actual - truth|| / ||truth|| over all tensors."""
    square = sum(float((a.double() - t).square().sum()) for a, t in zip(actual, truth, strict=True))
    return float((square / sum(float(t.square().sum()) for t in truth)) ** 0.5)


class Contestant:
    """One optimizer, or one function of gradients, in one dtype."""

    def __init__(
        self, make: Callable[[Problem], Step], method: Method, start: list[Tensor], dtype: Any
    ) -> None:
        params: list[Tensor] = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
        max_norm = MAX_NORM if method.clips else 1e9
        self.problem = Problem(params, LR, method.momentum, max_norm)
        self.set_gradients([torch.zeros_like(p) for p in start])
        self.step = make(self.problem)
        self.keeps: Any = getattr(self.step, "keeps", getattr(self.step, "__self__", None))

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        """Gives every parameter its gradient, in its own dtype."""
        for p, g in zip(self.problem.params, grads, strict=True):
            p.grad = g.to(p, copy=True)

    def values(self) -> list[Tensor]:
        """What a step changes."""
        params = self.problem.params
        changed = params if self.keeps is not None else [p.grad for p in params]
        return [x.detach().cpu().double().clone() for x in changed if x is not None]

    def take(self, other: Contestant) -> None:
        """Takes on the other's parameters and states."""
        with torch.no_grad():
            for p, q in zip(self.problem.params, other.problem.params, strict=True):
                p.copy_(q)
            if isinstance(self.keeps, torch.optim.Optimizer):
                # Step counts would be shared.
                self.keeps.load_state_dict(copy.deepcopy(other.keeps.state_dict()))
            else:
                for mine, its in zip(self.keeps or (), other.keeps or (), strict=True):
                    torch._foreach_copy_(mine, its)

    def advance(self, grads: Sequence[Tensor]) -> None:
        """A step on these gradients."""
        self.set_gradients(grads)
        self.step()

    def one_step_error(self, twin: Contestant, grads: Sequence[Tensor]) -> float:
        """Advances; the largest error against a twin in float64."""
        twin.take(self)
        self.set_gradients(grads)
        before = self.values()
        self.step()
        twin.advance(grads)
        every = zip(self.values(), twin.values(), before, strict=True)
        return max(ulp_error(x, t, b) for x, t, b in every)


def _reference(method: Method) -> Callable[[Problem], Step]:
    """Pysmooth's own step on the eager backend; for functions, which keep nothing, the rival's."""

    def make(problem: Problem) -> Step:
        step = method.ours(problem)[0]
        optimizer = getattr(step, "keeps", getattr(step, "__self__", None))
        if not isinstance(optimizer, FusedOptimizer):
            return pick(method, *PLAIN)[1](problem)
        optimizer._backend, optimizer._engine = "eager", None
        return step

    return make


_BEST = ("torch fused", rivals.EAGER, "torch foreach")
PLAIN = ("torch for-loop", rivals.EAGER, "torch fused")


def pick(method: Method, *names: str) -> tuple[str, Callable[[Problem], Step]]:
    """The first of these rivals that the method has."""
    name = next(name for name in names if name in method.rivals)
    return name, method.rivals[name]


def compare(
    names: Sequence[str] = tuple(METHODS),
    device: str = "cpu",
    steps: tuple[int, ...] = CHECKPOINTS,
) -> list[dict[str, Any]]:
    """Errors of pysmooth and of a rival after so many steps; one dict per method and checkpoint."""
    methods = [METHODS[name] for name in names if not METHODS[name].draws]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small, and the numbers of pysmooth are the same
    try:
        return [row for method in methods for row in _compare(method, device, steps)]
    finally:
        torch.set_num_threads(threads)


def _compare(method: Method, device: str, steps: tuple[int, ...]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    dtype, grad_dtype = DTYPES[method.dtype or "fp32"]

    def drawn() -> list[Tensor]:
        return [torch.randn(s, generator=generator).to(device) for s in SHAPES]

    start, target = [p.to(dtype) for p in drawn()], drawn()
    name, rival = pick(method, *_BEST)
    free = Contestant(pick(method, *PLAIN)[1], method, start, torch.float64)
    sides = {
        "pysmooth": (lambda p: method.ours(p)[0], _reference(method)),
        "rival": (rival, rival),
    }
    runs = {
        side: (
            Contestant(make, method, start, dtype),
            None if method.rounds_states else Contestant(exact, method, start, torch.float64),
        )
        for side, (make, exact) in sides.items()
    }
    worst = dict.fromkeys(runs, 0.0)
    rows: list[dict[str, Any]] = []
    for step in range(1, max(steps) + 1):
        noise = drawn()
        now = [p.detach() for p in free.problem.params]
        grads = [(p - t + n).to(grad_dtype) for p, t, n in zip(now, target, noise, strict=True)]
        for side, (run, twin) in runs.items():
            if twin is not None and (step <= 10 or step % 10 == 0 or step in steps):
                worst[side] = max(worst[side], run.one_step_error(twin, grads))
            else:
                run.advance(grads)
        free.advance(grads)
        if step not in steps:
            continue
        row: dict[str, Any] = {"method": method.name, "steps": step, "rival": name}
        for side, (run, twin) in runs.items():
            row[f"{side}_max_ulp"] = None if twin is None else worst[side]
            row[f"{side}_relative_error"] = relative_error(run.values(), free.values())
        rows.append(row)
    return rows
