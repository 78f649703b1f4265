"""Step sizes that are chosen on the host, from fused reductions, and then applied in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .._clip_grad import get_total_norm
from ..engine.checks import check_gradient
from ..engine.recipe import ClipSpec, Recipe, Scope
from ._base import FusedOptimizer
from ._validate import check_choice, check_flag, check_number


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all together, by the fused kernels; 0 of nothing."""
    return float(get_total_norm(list(tensors))) if tensors else 0.0


class HostStepOptimizer(FusedOptimizer):
    """p = p - lr * step_size * p.grad, `step_size` being chosen before each step.

    A subclass gives `choose(groups)`, the new numbers of the groups that share a step size; they
    live in the groups, under the names in `memory`, and so are saved, loaded and copied. A step
    that fails, or is skipped, leaves them as they were, and so does one without any gradient.

    The choice reads a norm: on a GPU it waits for the device.
    """

    # It is a factor of a number that the host makes.
    lr_on_device = False
    memory: dict[str, Any]

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        scope: str,
        maximize: bool,
        nonfinite: str,
        backend: str,
        amp: str = "external",
        **precision: Any,
    ) -> None:
        check_choice("scope", scope, ("global", "group"))
        # GradScaler then unscales before the step, and leaves steps out itself: a choice has to
        # see gradients as they are.
        check_choice("amp", amp, ("external",))
        super().__init__(
            params,
            {**defaults, "maximize": maximize, "step_size": None, **self.memory},
            scope=scope,
            nonfinite=nonfinite,
            norm_type=2.0,
            backend=backend,
            amp=amp,
            **precision,
        )

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """New values of `step_size` and of what is remembered, for groups that share them."""
        raise NotImplementedError

    def learn(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """What the step itself has told, if it was done."""
        return {}

    def units(self) -> list[list[dict[str, Any]]]:
        """The groups that share a step size."""
        groups = self.param_groups
        return [list(groups)] if self.scope == Scope.GLOBAL else [[group] for group in groups]

    def gradients(self, groups: list[dict[str, Any]]) -> list[Tensor]:
        """Those of the groups' parameters that have one."""
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def _has_gradients(self, groups: list[dict[str, Any]]) -> bool:
        return any(p.grad is not None for group in groups for p in group["params"])

    def norms_taken(self) -> list[float]:
        """The gradients' norms in the step that was done, per unit."""
        norms = self._engine.norms() if self._engine is not None else None
        return [] if norms is None else [float(norm) for norm in norms]

    def begins(self, groups: list[dict[str, Any]]) -> bool:
        """Whether none of the groups' parameters has a state; empty ones need none."""
        params = [p for group in groups for p in group["params"] if p.numel() > 0]
        return not any(self.state.get(p) for p in params)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("lr", group["lr"])
        check_flag("maximize", group["maximize"])

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Plain gradient descent with the step size that was chosen."""
        size = 0.0 if group["step_size"] is None else float(group["step_size"])
        hyper = (float(group["lr"]) * size, 0.0, 0.0, 0.0, 0.0, 0.0)
        return Recipe("sgd", hyper, (), ClipSpec(maximize=group["maximize"]))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        for group in self.param_groups:
            self._check(group)
        names = ("step_size", *self.memory)
        before = [{name: group[name] for name in names} for group in self.param_groups]
        skipped = self._skipped
        done = False
        moving = [(n, u) for n, u in enumerate(self.units()) if self._has_gradients(u)]
        try:
            try:
                self._update(self.choose, moving)
            except Exception:
                # What takes sums over gradients does not know whose they are.
                for p, label in zip(self._params(), self.param_labels(), strict=True):
                    check_gradient(p, label)
                raise
            super()._run()
            self._settle()
            found = getattr(self, "found_inf", None)
            done = self._skipped == skipped and (found is None or float(found) == 0)
            if done:
                self._update(self.learn, moving)
        finally:
            if not done:
                for group, old in zip(self.param_groups, before, strict=True):
                    group.update(old)

    @torch.no_grad()
    def _update(self, source: Any, moving: list[tuple[int, list[dict[str, Any]]]]) -> None:
        for number, groups in moving:
            numbers = source(groups, number)
            for group in groups:
                group.update(numbers)
