"""SGD with normalised momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import Recipe, Scope
from ._base import FusedOptimizer, check_scope
from ._clip import Clip, NonFinite, Norm, ScopeName, check_clip, clip_spec
from ._precision import Precision
from ._validate import check_number


class NormalizedSGD(FusedOptimizer):
    """Steps of length `lr` along a momentum.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`, with `max_norm`; not clipped by default)::

        for p in params:
            g = clip(p.grad)
            if first_step:
                momentum_buffer = g
            momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
        norm = norm of all momentum_buffers          # scope="global"; or per group, or per tensor
        for p in params:
            p = p - lr * weight_decay * p - lr * momentum_buffer / (norm + eps)

    A momentum of 0 throughout its scope moves nothing.

    State: `momentum_buffer`, 4 bytes per parameter (float32 also for 16-bit parameters), 8 for
    float64.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: length of the step, at least 0.
        momentum: decay rate of the momentum, in [0, 1); 0 normalises the gradient.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay`, times itself; at
            least 0.
        scope: over what the momentum's norm is taken: "global" (all groups together), "group" or
            "tensor"; and likewise the gradient's, where it is clipped.
        eps: added to the norm; 0 by default, as the theory has it.
        max_norm, clip, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend: the
            clip before the momentum and what goes with it, as in `pysmooth.ClipSGD`.
        maximize: ascend instead of descend.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2002.03305.
    """

    groups_say_all = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        scope: ScopeName = "global",
        eps: float = 0.0,
        max_norm: float | None = None,
        clip: Clip = "hard",
        clip_eps: float = 1e-6,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        norm_type: float = 2.0,
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.stage_scopes = (check_scope(scope), Scope.GLOBAL)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "max_norm": max_norm,
            "clip": clip,
            "clip_eps": clip_eps,
            "agc_factor": agc_factor,
            "agc_eps": agc_eps,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            scope=scope,
            nonfinite=nonfinite,
            norm_type=norm_type,
            norm=norm,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "weight_decay", "eps"):
            check_number(name, group[name])
        if check_number("momentum", group["momentum"]) >= 1:
            raise ValueError(f"momentum must be less than 1; got {float(group['momentum'])}")
        check_clip(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        names = ("lr", "momentum", "eps", "weight_decay")
        hyper = tuple(float(group[name]) for name in names)
        return Recipe("normalized_sgd", hyper, ("momentum_buffer",), clip_spec(group))
