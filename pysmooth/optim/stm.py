"""The (L0,L1) similar triangles method: accelerated gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._host_step import norm_of
from ._validate import check_choice, check_number

# nu solves nu = exp(-nu); the theory of (L0,L1)-methods takes step factors up to nu / 2.
NU = 0.5671432904097838


class STM(torch.optim.Optimizer):
    r"""(L0,L1)-STM, in the variants "max" and "plain".

    Equivalent to (k from 0; `y`, `z` start at the parameters, A at 0)::

        alpha = eta * (k + 2) / 2
        x = (A * y + alpha * z) / (A + alpha)       # where the parameters are: backward is here
        G = L0 + L1 * norm of all gradients at x    # "max": the largest so far
        z = z - alpha / G * grad
        y = (A * y + alpha * z) / (A + alpha);  A = A + alpha

    The parameters are x, where the next gradient is wanted; the method's result is y: `solution()`
    gives it, `swap_in_solution()` puts it into the parameters. "max" is the variant with a proof
    (its bound has a factor exp(L1 R0)); "plain" is often faster, and has none. For deterministic
    gradients. Plain torch: no kernel.

    State: `solution` (y) and `dual` (z), of the parameter's dtype.

    Args:
        params: parameters, named parameters, or groups of either; floating point.
        L0: smoothness at stationary points, at least 0; L0 and L1 must not both be 0.
        L1: growth of the smoothness with the gradient's norm, at least 0.
        eta: greater than 0; the theory takes at most nu / 2 = 0.2836.
        variant: "max" or "plain".
        scope: "global": one G; "group": each group its own, for independent runs.

    Raises:
        ValueError: an argument is out of range, or a gradient is not finite.

    Source: arXiv:2409.14989 (the scheme as recalled and derived again).
    """

    def __init__(
        self,
        params: ParamsT,
        L0: float,
        L1: float,
        eta: float = NU / 2,
        *,
        variant: Literal["max", "plain"] = "max",
        scope: Literal["global", "group"] = "global",
    ) -> None:
        l0, l1 = check_number("L0", L0), check_number("L1", L1)
        if l0 == 0 and l1 == 0:
            raise ValueError("L0 and L1 must not both be 0")
        check_choice("variant", variant, ("max", "plain"))
        self.scope = check_choice("scope", scope, ("global", "group"))
        eta = check_number("eta", eta, strict=True)
        defaults = {"L0": l0, "L1": l1, "eta": eta, "variant": variant}
        super().__init__(params, {**defaults, "k": 0, "A": 0.0, "G": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; gradients are those at the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        units = [groups] if self.scope == "global" else [[group] for group in groups]
        norms = []
        for unit in units:
            norms.append(norm_of([p.grad for g in unit for p in g["params"] if p.grad is not None]))
            if norms[-1] - norms[-1] != 0:
                raise ValueError("a gradient is not finite: nothing was changed")
        for unit, norm in zip(units, norms, strict=True):
            for group in unit:
                self._move(group, norm)
        return loss

    def _move(self, group: dict[str, Any], norm: float) -> None:
        curvature = group["L0"] + group["L1"] * norm
        if group["variant"] == "max":
            curvature = max(curvature, group["G"])
        alpha = group["eta"] * (group["k"] + 2) / 2
        total = group["A"] + alpha
        ahead = group["eta"] * (group["k"] + 3) / 2  # alpha of the next step
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["solution"] = p.detach().clone()
                state["dual"] = p.detach().clone()
            y, z = state["solution"], state["dual"]
            if curvature > 0:
                z.sub_(p.grad * (alpha / curvature))
            y.mul_(group["A"] / total).add_(z, alpha=alpha / total)
            p.copy_(y * (total / (total + ahead)) + z * (ahead / (total + ahead)))
        group["G"], group["A"], group["k"] = curvature, total, group["k"] + 1

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scope": self.scope}

    def solution(self) -> list[Tensor]:
        """Y of every parameter: the method's result so far."""
        params = [p for group in self.param_groups for p in group["params"]]
        return [self.state.get(p, {}).get("solution", p.detach()).clone() for p in params]

    @torch.no_grad()
    def swap_in_solution(self) -> None:
        """Puts y into the parameters, at the end: steps cannot go on from there."""
        params = [p for group in self.param_groups for p in group["params"]]
        for p, y in zip(params, self.solution(), strict=True):
            p.copy_(y)
