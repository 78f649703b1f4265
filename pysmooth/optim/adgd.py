"""Adaptive gradient descent without descent: the step size from how fast the gradient changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import SCALE, ClipMode, ClipSpec, Recipe
from ._base import check_scope
from ._clip import NonFinite
from ._host_step import HostStepOptimizer, norm_of
from ._precision import Precision
from ._validate import check_number


class AdGD(HostStepOptimizer):
    r"""AdGD: gradient descent with the local smoothness between the last two points.

    Equivalent to (`lr` in the first step, where there is no step before)::

        moved = step_size * norm of all prev_grads                # ||x_k - x_{k-1}||
        changed = norm of all (p.grad - prev_grad)
        new = min(sqrt(1 + ratio) * step_size, gamma * moved / changed)
        ratio, step_size = new / step_size, new
        for p in params:
            p = p - step_size * p.grad
            prev_grad = p.grad

    `ratio` is infinite at first: the first term does not count then, nor does the second where
    nothing moved or the gradient did not change. For deterministic gradients; see `AdSGD` for those
    of batches.

    One fused step: gradients are read for their norm, they and `prev_grad` for the change, and the
    parameters moved.

    State: `prev_grad`, 4 bytes per parameter (float32 also for 16-bit parameters), 8 for float64,
    and `scale`, the change, one number; the others are in `param_groups[i]`: "step_size", "ratio",
    "norm".

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: the first step size, at least 0 and small.
        gamma: greater than 0; 1/2 in the original, 1/4 in a later analysis (recalled, not read).
        scope: "global": one step size; "group": each group its own.
        maximize: ascend instead of descend.
        nonfinite, backend, precision: as in `pysmooth.ClipSGD`; `amp` is "external".

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:1910.09529; under (L0,L1)-smoothness, arXiv:2409.14989.
    """

    # `bounds`: of the step to come, as csrc/core/math/adgd.h has them.
    memory = {"ratio": math.inf, "norm": 0.0, "bounds": (0.0, 0.0, 0.0)}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        *,
        gamma: float = 0.5,
        scope: str = "global",
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.stage_scopes = (check_scope(scope),)
        super().__init__(
            params,
            {"lr": lr, "gamma": gamma},
            scope=scope,
            maximize=maximize,
            nonfinite=nonfinite,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        super().check_group(group)
        check_number("lr", group["lr"])
        check_number("gamma", group["gamma"], strict=True)

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """What bounds the step size; how the gradient changed is found out in the step."""
        g, last = groups[0], groups[0]["step_size"]
        if last is None or self.begins(groups):
            lr = float(g["lr"])
            return {"step_size": None, "bounds": (lr, math.inf, lr)}
        grown = math.sqrt(1 + g["ratio"]) * last
        travel = float(g["gamma"]) * last * g["norm"] if g["norm"] != 0 else math.inf
        return {"bounds": (grown, travel, grown if math.isfinite(grown) else last)}

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Its norm is taken, and clips nothing."""
        clip = ClipSpec(ClipMode.HARD, math.inf, maximize=group["maximize"])
        return Recipe("adgd", tuple(group["bounds"]), ("prev_grad",), clip, keeps_scale=True)

    def learn(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """The step size that it was."""
        params = [p for g in groups for p in g["params"] if p.grad is not None and p.numel() > 0]
        if not params:
            return {}
        changed = float(self.state[params[0]][SCALE])
        last, (grown, travel, still) = groups[0]["step_size"], groups[0]["bounds"]
        size = still if changed == 0 else travel / changed
        size = min(grown, size) if size == size else size
        ratio = size / last if last else math.inf
        return {"step_size": size, "ratio": ratio, "norm": self.norms_taken()[unit]}


class AdSGD(HostStepOptimizer):
    r"""Stochastic AdGD: both gradients, here and at the point before, of the same batch.

    Equivalent to (`closure` computes loss and gradients of one batch, and is called twice)::

        loss, g = closure() at p;  before = closure()'s gradient at prev_param
        moved, changed = norm of (p - prev_param), norm of (g - before)
        new = min(sqrt(1 + amplifier * ratio) * step_size, moved / (damping * changed)) + eps
        ratio, step_size = new / step_size, new
        prev_param, p = p, p - step_size * g

    The first step has size `lr` and calls the closure once. The closure must not draw a new batch,
    nor random numbers that differ between its two calls.

    State: `prev_param`, of the parameter's dtype; numbers as in `AdGD`.

    Args:
        params: as in `AdGD`.
        lr: the first step size, greater than 0.
        amplifier: how fast the step size may grow, at least 0.
        damping: greater than 0.
        eps: added to the step size, at least 0; its place is as recalled of the authors' code.
        scope, maximize, nonfinite, backend, precision: as in `AdGD`.

    Raises:
        ValueError: an argument is out of range, or there is no closure.

    Source: arXiv:1910.09529, and the defaults of its authors' code.
    """

    memory = {"ratio": 1.0}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.2,
        *,
        amplifier: float = 0.02,
        damping: float = 1.0,
        eps: float = 1e-5,
        scope: str = "global",
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self._before: dict[Tensor, Tensor] = {}
        super().__init__(
            params,
            {"lr": lr, "amplifier": amplifier, "damping": damping, "eps": eps},
            scope=scope,
            maximize=maximize,
            nonfinite=nonfinite,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        super().check_group(group)
        for name in ("lr", "damping"):
            check_number(name, group[name], strict=True)
        for name in ("amplifier", "eps"):
            check_number(name, group[name])

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Plain gradient descent."""
        size = group["lr"] if group["step_size"] is None else group["step_size"]
        hyper = (float(size), 0.0, 0.0, 0.0, 0.0, 0.0)
        return Recipe("sgd", hyper, (), ClipSpec(maximize=group["maximize"]))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; returns the loss at the present point."""
        if closure is None:
            raise ValueError("step() needs a closure: it takes the batch's gradient at two points")
        moved = [p for p in self._params() if "prev_param" in self.state.get(p, {})]
        here = [p.detach().clone() for p in self._params()]
        self._before = {}
        if moved:
            try:
                with torch.no_grad():
                    for p in moved:
                        p.copy_(self.state[p]["prev_param"])
                with torch.enable_grad():
                    closure()
                self._before = {p: p.grad.clone() for p in moved if p.grad is not None}
            finally:
                with torch.no_grad():
                    for p, x in zip(self._params(), here, strict=True):
                        p.copy_(x)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        skipped = self._skipped
        self._run()
        if self._skipped == skipped:
            for p, x in zip(self._params(), here, strict=True):
                if p.grad is not None:
                    self.state[p]["prev_param"] = x
        return loss

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """From the batch's own smoothness between the last two points."""
        g, last = groups[0], groups[0]["step_size"]
        if last is None:
            return {"step_size": float(g["lr"]), "ratio": 1.0}
        params = [p for group in groups for p in group["params"] if p in self._before]
        moved = norm_of([p - self.state[p]["prev_param"] for p in params])
        changed = norm_of([p.grad - self._before[p] for p in params if p.grad is not None])
        grown = math.sqrt(1 + float(g["amplifier"]) * g["ratio"]) * last
        size = moved / (float(g["damping"]) * changed) if changed else math.inf
        size = size if math.isnan(size) else min(size, grown) + float(g["eps"])
        return {"step_size": size, "ratio": size / last}
