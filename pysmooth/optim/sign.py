"""Steps along signs: SignSGD, Signum, Lion."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import Recipe, Scope
from ._base import FusedOptimizer
from ._clip import Clip, NonFinite, Norm, ScopeName, check_clip, clip_spec
from ._precision import Precision
from ._validate import check_flag, check_number
from .adam import check_betas


class SignSGD(FusedOptimizer):
    """Steps of one size along the gradient's signs, or along the momentum's (Signum).

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            g = clip(p.grad)
            if momentum:
                momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
                g = momentum_buffer
            scale = g.abs().mean() if scaled else 1
            p = p - lr * weight_decay * p - lr * scale * sign(g)

    sign(0) = 0, so that embedding rows that were not touched do not drift; NaN stays NaN. The parts
    of a complex parameter are taken by themselves. Scaling the gradient changes no sign: without
    momentum a clip only matters through `nonfinite` and `last_norm()`.

    State: `momentum_buffer` with momentum, 4 bytes per parameter (float32 also for 16-bit
    parameters), 8 for float64; it starts from 0. None without.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: size of the step in every coordinate (in units of `scale`), at least 0.
        momentum: decay rate of the momentum, in [0, 1).
        scaled: multiply the signs by the mean magnitude of what they are taken of, per tensor.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay`, times itself; at
            least 0.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend:
            the clip inside the step and what goes with it, as in `pysmooth.ClipSGD`.
        maximize: ascend instead of descend.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:1802.04434.
    """

    groups_say_all = True

    stage_scopes = (Scope.TENSOR, Scope.GLOBAL)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        scaled: bool = False,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "scaled": scaled,
            "weight_decay": weight_decay,
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
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        if check_number("momentum", group["momentum"]) >= 1:
            raise ValueError(f"momentum must be less than 1; got {float(group['momentum'])}")
        check_flag("scaled", group["scaled"])
        check_clip(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        momentum = float(group["momentum"])
        hyper = (float(group["lr"]), momentum, float(group["weight_decay"]))
        prefix = "scaled_" if group["scaled"] else ""
        if momentum == 0:
            return Recipe(prefix + "sign_sgd", hyper, (), clip_spec(group))
        return Recipe(prefix + "signum", hyper, ("momentum_buffer",), clip_spec(group))


class Signum(SignSGD):
    """`SignSGD` with momentum, 0.9 by default; everything else is as there."""

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, momentum: float = 0.9, **kwargs: Any
    ) -> None:
        super().__init__(params, lr, momentum=momentum, **kwargs)


class Lion(FusedOptimizer):
    """Steps along the signs of an interpolated momentum.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            g = clip(p.grad)
            direction = sign(beta1 * exp_avg + (1 - beta1) * g)
            exp_avg = beta2 * exp_avg + (1 - beta2) * g
            p = p - lr * weight_decay * p - lr * direction

    with sign as in `SignSGD`.

    State: `exp_avg`, 4 bytes per parameter (float32 also for 16-bit parameters), 8 for float64.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: size of the step in every coordinate, at least 0.
        betas: weights of the interpolation and of the momentum, each in [0, 1).
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay`, times itself; at
            least 0.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend:
            the clip inside the step and what goes with it, as in `pysmooth.ClipSGD`.
        maximize: ascend instead of descend.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2302.06675.
    """

    groups_say_all = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
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
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        check_betas(group["betas"])
        check_clip(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        beta1, beta2 = group["betas"]
        hyper = (float(group["lr"]), float(beta1), float(beta2), float(group["weight_decay"]))
        return Recipe("lion", hyper, ("exp_avg",), clip_spec(group))
