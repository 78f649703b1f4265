"""Adaptive gradient descent without descent: the step size from how fast the gradient changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.recipe import ClipSpec, Recipe
from ._clip import Backend, NonFinite
from ._host_step import HostStepOptimizer, norm_of
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

    `ratio` is infinite at first: the first term does not count then, nor does the second where the
    gradient did not change. For deterministic gradients; see `AdSGD` for those of batches.

    State: `prev_grad`, 4 bytes per parameter (float32 also for 16-bit parameters), 8 for float64;
    the numbers are in `param_groups[i]`: "step_size", "ratio". Each step makes a passing copy of
    the gradients' difference.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: the first step size, greater than 0 and small.
        gamma: greater than 0; 1/2 in the original, 1/4 in a later analysis (recalled, not read).
        scope: "global": one step size; "group": each group its own.
        nonfinite, backend: as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:1910.09529; under (L0,L1)-smoothness, arXiv:2409.14989.
    """

    memory = {"ratio": math.inf}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        *,
        gamma: float = 0.5,
        scope: str = "global",
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
    ) -> None:
        defaults = {"lr": lr, "gamma": gamma}
        super().__init__(params, defaults, scope=scope, nonfinite=nonfinite, backend=backend)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "gamma"):
            check_number(name, group[name], strict=True)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """A momentum that keeps nothing: its buffer is the gradient of this step."""
        size = group["lr"] if group["step_size"] is None else group["step_size"]
        hyper = (float(size), 0.0, 0.0, 0.0, 0.0, 0.0)
        return Recipe("sgd_momentum", hyper, ("prev_grad",), ClipSpec())

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """From those parameters that have moved."""
        last = groups[0]["step_size"]
        if last is None:
            return {"step_size": float(groups[0]["lr"]), "ratio": math.inf}
        pairs = [
            (p.grad, self.state[p]["prev_grad"])
            for group in groups
            for p in group["params"]
            if p.grad is not None and self.state.get(p, {}).get("prev_grad") is not None
        ]
        moved = last * norm_of([b for _, b in pairs])
        changed = norm_of([g - b for g, b in pairs])
        size = math.nan if math.isnan(changed) or math.isnan(moved) else math.inf
        if changed > 0:
            size = float(groups[0]["gamma"]) * moved / changed
        grown = math.sqrt(1 + groups[0]["ratio"]) * last
        size = size if size != size else min(size, grown)
        if math.isinf(size):
            size = last
        return {"step_size": size, "ratio": size / last if last else math.inf}


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
        scope, nonfinite, backend: as in `AdGD`.

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
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
    ) -> None:
        defaults = {"lr": lr, "amplifier": amplifier, "damping": damping, "eps": eps}
        self._before: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults, scope=scope, nonfinite=nonfinite, backend=backend)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "damping"):
            check_number(name, group[name], strict=True)
        for name in ("amplifier", "eps"):
            check_number(name, group[name])

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Plain gradient descent."""
        size = group["lr"] if group["step_size"] is None else group["step_size"]
        return Recipe("sgd", (float(size), 0.0, 0.0, 0.0, 0.0, 0.0))

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
