"""Step sizes that are chosen on the host, from fused reductions, and then applied in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._clip_grad import get_total_norm
from ..engine.checks import check_gradient
from ..engine.recipe import ClipSpec, Recipe
from ._base import FusedOptimizer
from ._validate import check_choice, check_number


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all together, by the fused kernels; 0 of nothing."""
    return float(get_total_norm(list(tensors))) if tensors else 0.0


class HostStepOptimizer(FusedOptimizer):
    """p = p - lr * step_size * p.grad, `step_size` being chosen before each step.

    A subclass gives `choose(groups)`, the new numbers of the groups that share a step size; they
    live in the groups, under the names in `memory`, and so are saved, loaded and copied. A step
    that fails, or is skipped, leaves them as they were.

    The choice reads a norm: on a GPU it waits for the device.
    """

    # GradScaler then unscales before the step, and leaves steps out itself: a choice has to see
    # gradients as they are.
    _step_supports_amp_scaling = False
    memory: dict[str, Any]

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, scope: str, nonfinite: str, backend: str
    ) -> None:
        check_choice("scope", scope, ("global", "group"))
        super().__init__(
            params,
            {**defaults, "step_size": None, **self.memory},
            scope=scope,
            nonfinite=nonfinite,
            norm_type=2.0,
            backend=backend,
        )

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """New values of `step_size` and of what is remembered, for groups that share them."""
        raise NotImplementedError

    def units(self) -> list[list[dict[str, Any]]]:
        """The groups that share a step size."""
        groups = self.param_groups
        return [list(groups)] if self.scope.name == "GLOBAL" else [[group] for group in groups]

    def gradients(self, groups: list[dict[str, Any]]) -> list[Tensor]:
        """Those of the groups' parameters that have one."""
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("lr", group["lr"])

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Plain gradient descent with the step size that was chosen."""
        size = 0.0 if group["step_size"] is None else float(group["step_size"])
        return Recipe("sgd", (float(group["lr"]) * size, 0.0, 0.0, 0.0, 0.0, 0.0), (), ClipSpec())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        for p, label in zip(self._params(), self.param_labels(), strict=True):
            check_gradient(p, label)
        names = ("step_size", *self.memory)
        before = [{name: group[name] for name in names} for group in self.param_groups]
        skipped = self._skipped
        done = False
        try:
            with torch.no_grad():
                for number, groups in enumerate(self.units()):
                    chosen = self.choose(groups, number)
                    for group in groups:
                        group.update(chosen)
            super()._run()
            self._settle()
            done = self._skipped == skipped
        finally:
            if not done:
                for group, old in zip(self.param_groups, before, strict=True):
                    group.update(old)
