"""The (L0,L1) similar triangles method: accelerated gradient descent."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import ClipSpec, Recipe
from ._clip import NonFinite
from ._host_step import HostStepOptimizer, norm_of
from ._precision import Precision
from ._validate import check_choice, check_number

# nu solves nu = exp(-nu); the theory of (L0,L1)-methods takes step factors up to nu / 2.
NU = 0.5671432904097838


class STM(HostStepOptimizer):
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
    gradients. The step reads gradients for the norm, and does the rest in one pass.

    State: `solution` (y) and `dual` (z), each 4 bytes per parameter (float32 also for 16-bit
    parameters), 8 for float64; the numbers are in `param_groups[i]`: "k", "A", "G".

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        L0: smoothness at stationary points, at least 0; L0 and L1 must not both be 0.
        L1: growth of the smoothness with the gradient's norm, at least 0.
        eta: the group's `lr`, at least 0; the theory takes at most nu / 2 = 0.2836.
        variant: "max" or "plain".
        scope: "global": one G; "group": each group its own, for independent runs.
        maximize: ascend instead of descend.
        nonfinite, backend, precision: as in `pysmooth.ClipSGD`; `amp` is "external".

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2409.14989 (the scheme as recalled and derived again).
    """

    memory = {"k": 0, "A": 0.0, "G": 0.0}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        L0: float,
        L1: float,
        eta: float = NU / 2,
        *,
        variant: Literal["max", "plain"] = "max",
        scope: Literal["global", "group"] = "global",
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            {"lr": eta, "L0": L0, "L1": L1, "variant": variant},
            scope=scope,
            maximize=maximize,
            nonfinite=nonfinite,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        super().check_group(group)
        if check_number("L0", group["L0"]) == 0 and check_number("L1", group["L1"]) == 0:
            raise ValueError("L0 and L1 must not both be 0")
        check_number("L1", group["L1"])
        check_choice("variant", group["variant"], ("max", "plain"))

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """The count, the weights' sum, and the curvature at hand."""
        g = {**groups[0], **self.memory} if self.begins(groups) else groups[0]
        curvature = float(g["L0"]) + float(g["L1"]) * norm_of(self.gradients(groups))
        if g["variant"] == "max":
            curvature = max(curvature, g["G"])
        alpha = float(g["lr"]) * (g["k"] + 2) / 2
        size = alpha / curvature if curvature != 0 else 0.0
        return {"step_size": size, "k": g["k"] + 1, "A": g["A"] + alpha, "G": curvature}

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The triangles' weights, of this step and of the next."""
        eta, k, total = float(group["lr"]), group["k"], float(group["A"])
        alpha, ahead = eta * (k + 1) / 2, eta * (k + 2) / 2
        near = total / (total + ahead) if total + ahead > 0 else 1.0
        hyper = (
            float(group["step_size"] or 0.0),
            max(0.0, 1 - alpha / total) if total > 0 else 0.0,
            min(1.0, alpha / total) if total > 0 else 1.0,
            near,
            ahead / (total + ahead) if total + ahead > 0 else 0.0,
        )
        clip = ClipSpec(maximize=group["maximize"])
        return Recipe("stm", hyper, ("solution", "dual"), clip)

    def solution(self) -> list[Tensor]:
        """Y of every parameter: the method's result so far."""
        return [self.state.get(p, {}).get("solution", p.detach()).clone() for p in self._params()]

    @torch.no_grad()
    def swap_in_solution(self) -> None:
        """Puts y into the parameters, at the end: steps cannot go on from there."""
        for p, y in zip(self._params(), self.solution(), strict=True):
            p.copy_(y)
        self.sync_master_weights()
