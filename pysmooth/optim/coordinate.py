"""Coordinate descent: one number per step, with its derivative or with comparisons alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..reference.random import bits, uniform
from ._validate import check_number, check_seed

Constants = float | Sequence[Tensor]
_GOLDEN = (math.sqrt(5) - 1) / 2


class _RandomCoordinate(torch.optim.Optimizer):
    """Draws the coordinate of each step: by `seed` and the number of the step alone."""

    kept: tuple[str, ...]  # attributes that copies take along

    def __init__(self, params: ParamsT, defaults: dict[str, Any], seed: int) -> None:
        check_seed("seed", seed)
        super().__init__(params, {**defaults, "steps": 0})
        self.seed = seed
        if sum(p.numel() for p in self._params()) == 0:
            raise ValueError("the parameters have no coordinate")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch."""
        count = len(self.param_groups)
        super().add_param_group(param_group)
        added = [p for group in self.param_groups[count:] for p in group["params"]]
        if not all(p.is_contiguous() and p.is_floating_point() for p in added):
            del self.param_groups[count:]
            raise ValueError("coordinate descent takes contiguous, real parameters only")

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("seed", *self.kept)}
        return {**super().__getstate__(), **own}

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _draw(self) -> tuple[int, Tensor, int]:
        """The parameter's number, the parameter, and the coordinate in it."""
        step = self.param_groups[0]["steps"]
        drawn = bits(1, torch.float64, seed=self.seed, step=step, tensor_id=0)
        params = self._params()
        index = int(float(uniform(drawn)) * sum(p.numel() for p in params))
        for number, p in enumerate(params):
            if index < p.numel():
                return number, p, index
            index -= p.numel()
        raise AssertionError

    def _count(self) -> None:
        for group in self.param_groups:
            group["steps"] += 1


class CoordinateDescent(_RandomCoordinate):
    r"""Random coordinate descent with (L0,L1)-steps.

    Equivalent to, with i drawn evenly from all coordinates of all parameters::

        p[i] = p[i] - p.grad[i] / (L0[i] + L1[i] * abs(p.grad[i]))

    One number is written per step, in place. A coordinate whose derivative is 0 stays. If the
    coordinate functions are (0, L1)-smooth, a convex loss falls by 1 - 1 / (2 d L1 R) per step in
    expectation (derived for a global L1).

    Args:
        params: parameters or groups; contiguous, real.
        L0: of every coordinate function, a number of at least 0, or a list of tensors shaped as the
            parameters, with a constant per coordinate.
        L1: likewise. No coordinate may have L0 = L1 = 0.
        seed: of the draws, from 0 to 2^64 - 1.

    Raises:
        ValueError: an argument is out of range or of the wrong shape; there is no closure, or the
            drawn parameter has no gradient or one that is not finite.

    Source: arXiv:2412.17050.
    """

    kept = ("constants", "by_coordinate")

    def __init__(self, params: ParamsT, L0: Constants, L1: Constants, *, seed: int = 0) -> None:
        super().__init__(params, {}, seed)
        self.by_coordinate = any(isinstance(v, Sequence) for v in (L0, L1))
        self.constants = tuple(
            _constants(n, v, self._params()) for n, v in (("L0", L0), ("L1", L1))
        )
        for a, b in zip(*self.constants, strict=True):
            if bool(((a == 0) & (b == 0)).any()):
                raise ValueError("L0 and L1 must not both be 0")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; not where every coordinate has constants of its own.

        Raises:
            ValueError: it has, or the parameters are not contiguous or real.
        """
        known = getattr(self, "constants", ())  # not there while the constructor runs
        if known and self.by_coordinate:
            raise ValueError("a group cannot be added: L0 or L1 is a list, without its constants")
        super().add_param_group(param_group)
        if known:
            self.constants = tuple([cs[0]] * len(self._params()) for cs in known)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; the closure calls backward, and returns the loss."""
        if closure is None:
            raise ValueError("step() needs a closure that computes gradients")
        with torch.enable_grad():
            loss = closure()
        number, p, i = self._draw()
        if p.grad is None:
            raise ValueError(f"parameter {number} has no gradient")
        slope = float(p.grad.reshape(-1)[i])
        if not math.isfinite(slope):
            raise ValueError(f"the gradient of parameter {number} is not finite")
        l0, l1 = (
            float(c[number] if c[number].dim() == 0 else c[number].view(-1)[i])
            for c in self.constants
        )
        if slope != 0:
            p.detach().view(-1)[i] -= slope / (l0 + l1 * abs(slope))
        self._count()
        return loss


class OrderOracleCD(_RandomCoordinate):
    r"""Coordinate descent that only ever asks which of two points has the lower loss.

    Each step searches one drawn coordinate by golden sections::

        a, b = -bracket, bracket
        while b - a > tol: shrink [a, b] to the part that one comparison leaves
        p[i] = p[i] + (a + b) / 2

    With `expand` the bracket is doubled, up to 60 times, while its end is better than the point
    inside.

    Args:
        params: as in `CoordinateDescent`.
        bracket: half the length of the interval, greater than 0.
        tol: length at which the search ends, greater than 0.
        expand: whether the bracket may grow.
        seed: of the draws.

    Raises:
        ValueError: an argument is out of range, or there is no closure.

    Source: arXiv:2412.17050. Which bracket it takes is not known: it is an argument here.
    """

    kept = ("comparisons",)

    def __init__(
        self,
        params: ParamsT,
        *,
        bracket: float = 2.0,
        tol: float = 1e-8,
        expand: bool = False,
        seed: int = 0,
    ) -> None:
        check_number("bracket", bracket, strict=True)
        check_number("tol", tol, strict=True)
        super().__init__(params, {"bracket": bracket, "tol": tol, "expand": expand}, seed)
        self.comparisons = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; the closure returns the loss, and need not call backward."""
        if closure is None:
            raise ValueError("step() needs a closure that returns the loss")
        _, p, i = self._draw()
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        flat = p.detach().view(-1)
        start = flat[i].clone()

        def loss(offset: float) -> float:
            flat[i] = start + offset
            with torch.no_grad():
                return float(closure())

        try:
            best = self._search(loss, group)
        except BaseException:
            flat[i] = start
            raise
        flat[i] = start + best
        self._count()
        return None

    def _search(self, loss: Callable[[float], float], group: dict[str, Any]) -> float:
        half = float(group["bracket"])
        for _ in range(60 if group["expand"] else 0):
            ends, inside = (loss(-half), loss(half)), (loss(-half / 2), loss(half / 2))
            self.comparisons += 2
            if ends[0] >= inside[0] and ends[1] >= inside[1]:
                break
            half *= 2
        a, b = -half, half
        y, z = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        at_y, at_z = loss(y), loss(z)
        # Rounding may keep an interval from ever getting as short as asked for.
        for _ in range(math.ceil(math.log(2 * half / group["tol"], 1 / _GOLDEN)) + 1):
            if b - a <= float(group["tol"]):
                break
            self.comparisons += 1
            if at_y < at_z:
                b, z, at_z = z, y, at_y
                y = b - _GOLDEN * (b - a)
                at_y = loss(y)
            else:
                a, y, at_y = y, z, at_z
                z = a + _GOLDEN * (b - a)
                at_z = loss(z)
        return (a + b) / 2


def _constants(name: str, value: Constants, params: list[Tensor]) -> list[Tensor]:
    if not isinstance(value, Sequence):
        return [torch.tensor(check_number(name, value), dtype=torch.float64)] * len(params)
    if [t.shape for t in value] != [p.shape for p in params]:
        raise ValueError(f"{name} must have one tensor per parameter, of its shape")
    for t in value:
        if not bool((t >= 0).all()):
            raise ValueError(f"{name} must be at least 0 everywhere")
    return [t.detach().contiguous() for t in value]
