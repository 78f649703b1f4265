"""Whether the contestants do the same work: ten steps of each on the same gradients.

The distance is that of numerics.py: relative, from a float64 run of the rival's plain torch code.
A rival that is fast because it computes something else is seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import packages, rivals
from .methods import DTYPES, METHODS, Method
from .numerics import PLAIN, Contestant, pick, relative_error
from .problem import Problem, Step

# More than 4,096 elements in one: smaller tensors are spared by those who keep 8 bits.
SHAPES = [(96, 64), (257,), (16, 8, 3, 3)]
STEPS = 10


def measure(
    names: Sequence[str], device: str, compiled: bool, left_out: list[str]
) -> list[dict[str, Any]]:
    """One dict per method and contestant; methods that draw random numbers are left out.

    A step that does not compile gets a line in `left_out`.
    """
    chosen = [METHODS[n] for n in names if not METHODS[n].draws and "clip_grad_norm" not in n]
    return [row for method in chosen for row in _of(method, device, compiled, left_out)]


def _of(method: Method, device: str, compiled: bool, left_out: list[str]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    dtype, grad_dtype = DTYPES[method.dtype or "fp32"]
    start = [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]
    grads = [
        [torch.randn(s, generator=generator).to(device, grad_dtype) for s in SHAPES]
        for _ in range(STEPS)
    ]
    sides: dict[str, Callable[[Problem], Step]] = {"pysmooth": lambda p: method.ours(p)[0]}
    sides |= {n: make for n, make in method.rivals.items() if packages.present(n, device)}
    if compiled and method.compiled is not None:
        sides[rivals.COMPILED] = lambda p: _first_undone(method, p)
    truth = Contestant(pick(method, *PLAIN)[1], method, start, torch.float64)
    for now in grads:
        truth.advance(now)
    rows = []
    for name, make in sides.items():
        try:
            side = Contestant(make, method, start, dtype)
            for now in grads:
                side.advance(now)
        except packages.MissingError:
            continue
        except Exception as error:
            if name != rivals.COMPILED:
                raise
            left_out.append(rivals.not_compiled(f"{method.name}, agreement", error))
            continue
        distance = relative_error(side.values(), truth.values())
        rows.append({"method": method.name, "contestant": name, "distance": distance})
    return rows


def _first_undone(method: Method, problem: Problem) -> Step:
    """The compiled step, as if compiling it, which takes a step, had not taken one."""
    assert method.compiled is not None
    before = [p.detach().clone() for p in problem.params]
    step, _ = method.compiled(problem)
    with torch.no_grad():
        torch._foreach_copy_([p.detach() for p in problem.params], before)
        keeps = step.keeps  # type: ignore[attr-defined]
        starting = getattr(step, "starting", 0)
        for states in keeps[:starting]:
            torch._foreach_copy_(states, before)
        for states in filter(None, keeps[starting:]):
            torch._foreach_zero_(states)
    return step
