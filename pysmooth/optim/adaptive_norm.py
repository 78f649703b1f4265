"""AdaGrad and Adam with one step size for all coordinates: the norm versions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import Recipe
from ._base import FusedOptimizer
from ._clip import Clip, NonFinite, Norm, ScopeName, check_clip, clip_spec
from ._precision import Precision
from ._validate import check_below_one, check_flag, check_number
from .adam import check_betas


class _AdaptiveNorm(FusedOptimizer):
    """What the norm versions share. A subclass says how the accumulator moves."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        scope: ScopeName,
        nonfinite: NonFinite,
        norm: Norm,
        backend: Backend,
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            defaults,
            scope=scope,
            nonfinite=nonfinite,
            norm_type=2.0,
            norm=norm,
            backend=backend,
            **precision,
        )

    def accumulator(self, group: dict[str, Any]) -> tuple[float, float, float]:
        """(beta1, keep, admit): `b2 = keep * b2 + admit * norm(g)^2`."""
        raise NotImplementedError

    def check_betas(self, group: dict[str, Any]) -> None:
        """Refuses decay rates that make no sense."""
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "weight_decay", "eps"):
            check_number(name, group[name])
        for name in ("b_init", "reweight"):
            check_number(name, group[name], strict=True)
        if not 1e-150 <= float(group["b_init"]) <= 1e150:
            raise ValueError(f"b_init must be from 1e-150 to 1e150; got {float(group['b_init'])}")
        check_flag("delayed", group["delayed"])
        check_flag("coordinate_wise", group["coordinate_wise"])
        self.check_betas(group)
        check_clip(group)
        by_value = group["clip"] == "value" and group["max_norm"] is not None
        if by_value and not group["coordinate_wise"]:
            raise ValueError("clip='value' goes with coordinate_wise=True only")

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        beta1, keep, admit = self.accumulator(group)
        start = float(group["b_init"]) ** 2
        suffix = "_momentum" if beta1 else ""
        momentum = ("exp_avg",) if beta1 else ()
        hyper = (float(group["lr"]), beta1, keep, admit, float(group["delayed"]))
        decay = float(group["weight_decay"])
        if group["coordinate_wise"]:
            return Recipe(
                "accumulator" + suffix,
                (*hyper, float(group["eps"]), decay),
                ("exp_avg_sq", *momentum),
                clip_spec(group),
                init=(start,),
            )
        return Recipe(
            "norm_accumulator" + suffix,
            (*hyper, decay),
            momentum,
            clip_spec(group),
            accumulates=True,
            init=(*(0.0 for _ in momentum), start),
        )


class MAdagradNorm(_AdaptiveNorm):
    """AdaGrad-Norm with momentum, on clipped gradients.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`, with `max_norm`; not clipped by default)::

        norm_sq = b_init ** 2                                     # before the first step
        sum_squares = sum((clip(p.grad) ** 2).sum() for p in params)    # over the scope
        before, norm_sq = norm_sq, norm_sq + reweight * sum_squares
        b = sqrt(before if delayed else norm_sq)
        for p in params:
            exp_avg = beta1 * exp_avg + (1 - beta1) * clip(p.grad)
            p = p - lr * weight_decay * p - lr / b * exp_avg

    The clipped gradient enters both the momentum and the accumulator. There is no bias correction.
    `delayed=True` divides by what was accumulated up to the step before. `coordinate_wise=True`
    accumulates every coordinate's square by itself (`exp_avg_sq`) and divides by `sqrt(.) + eps`.

    State: `state[p]["norm_sq"]`, float64 of shape (), the same number in all parameters of a scope
    unit; with momentum `exp_avg`, 4 bytes per parameter (8 for float64). Coordinate-wise,
    `exp_avg_sq` of the parameter's shape instead of `norm_sq`. A parameter that gets its first
    gradient late joins with the number that its group has.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        b_init: what the accumulator starts from, greater than 0: with 0 the first step would have
            length `lr` whatever the gradient. In units of the gradient's norm.
        beta1: decay rate of the momentum, in [0, 1); 0: no momentum.
        reweight: factor of new squares (the "R" of Clip-RAdaGradD), greater than 0.
        delayed: divide by the accumulator without this step's gradient.
        coordinate_wise: one accumulator per coordinate.
        eps: added to the root, coordinate-wise only.
        weight_decay: decoupled, at least 0.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm, backend: the clip
            inside the step, as in `pysmooth.ClipSGD`. The accumulator has the same scope.
            clip="value" only coordinate-wise.
        maximize: ascend instead of descend.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2406.04443, algorithms 1 and 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        b_init: float,
        beta1: float = 0.9,
        reweight: float = 1.0,
        delayed: bool = False,
        coordinate_wise: bool = False,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
        clip_eps: float = 0.0,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        defaults = {
            "lr": lr,
            "b_init": b_init,
            "beta1": beta1,
            "reweight": reweight,
            "delayed": delayed,
            "coordinate_wise": coordinate_wise,
            "eps": eps,
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
            norm=norm,
            backend=backend,
            **precision,
        )

    def accumulator(self, group: dict[str, Any]) -> tuple[float, float, float]:
        """(beta1, keep, admit)."""
        return float(group["beta1"]), 1.0, float(group["reweight"])

    def check_betas(self, group: dict[str, Any]) -> None:
        """Refuses decay rates that make no sense."""
        check_below_one("beta1", group["beta1"])


class AdagradNorm(MAdagradNorm):
    """AdaGrad-Norm on clipped gradients: `pysmooth.MAdagradNorm` with `beta1=0`.

    Equivalent to::

        norm_sq = norm_sq + reweight * sum_squares                # of clip(p.grad), over the scope
        p = p - lr * weight_decay * p - lr / sqrt(norm_sq) * clip(p.grad)

    State: 8 bytes per tensor, nothing per parameter. Arguments and errors as there.

    Source: arXiv:2406.04443; AdaGrad-Norm: arXiv:1806.01811.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, *, b_init: float, **kwargs: Any
    ) -> None:
        super().__init__(params, lr, b_init=b_init, beta1=0.0, **kwargs)


class ClipRAdaGradD(AdagradNorm):
    """Clip-RAdaGradD: clipped, reweighted, delayed AdaGrad-Norm.

    Equivalent to `pysmooth.AdagradNorm` with delayed=True and a clip that is not optional::

        p = p - lr / sqrt(norm_sq) * clip(p.grad)
        norm_sq = norm_sq + reweight * sum_squares                # of clip(p.grad), over the scope

    `reweight` is a change of parameters: `lr`, `b_init`, `reweight` make the same steps as
    `lr / sqrt(reweight)`, `b_init / sqrt(reweight)`, 1.

    State, errors and the other arguments as in `pysmooth.AdagradNorm`.

    Source: arXiv:2406.04443 (v1).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        b_init: float,
        max_norm: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, b_init=b_init, max_norm=max_norm, delayed=True, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("max_norm", group["max_norm"], strict=True, infinite=True)
        super().check_group(group)


class AdamNorm(_AdaptiveNorm):
    """Adam-Norm on clipped gradients: Adam with one step size for all coordinates.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`, with `max_norm`; not clipped by default)::

        norm_sq = b_init ** 2                                     # before the first step
        sum_squares = sum((clip(p.grad) ** 2).sum() for p in params)    # over the scope
        before, norm_sq = norm_sq, beta2 * norm_sq + reweight * (1 - beta2) * sum_squares
        b = sqrt(before if delayed else norm_sq)
        for p in params:
            exp_avg = beta1 * exp_avg + (1 - beta1) * clip(p.grad)
            p = p - lr * weight_decay * p - lr / b * exp_avg

    There is no bias correction: `b_init` plays its part. `coordinate_wise=True` keeps an
    `exp_avg_sq` per coordinate, from `b_init ** 2`, and divides by `sqrt(exp_avg_sq) + eps`.

    State as in `pysmooth.MAdagradNorm`.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        b_init: what the accumulator starts from, greater than 0, in units of the gradient's norm.
        betas: decay rates of the momentum and of the accumulator, in [0, 1). The theory takes
            beta2 = 1 - 1 / K for K steps.
        reweight: factor of new squares, greater than 0.
        delayed: divide by the accumulator without this step's gradient (AdamD-Norm).
        coordinate_wise, eps, weight_decay: as in `pysmooth.MAdagradNorm`.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm, backend: as there.
        maximize: ascend instead of descend.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2406.04443, algorithms 1 and 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        b_init: float,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        reweight: float = 1.0,
        delayed: bool = False,
        coordinate_wise: bool = False,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
        clip_eps: float = 0.0,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        defaults = {
            "lr": lr,
            "b_init": b_init,
            "betas": betas,
            "reweight": reweight,
            "delayed": delayed,
            "coordinate_wise": coordinate_wise,
            "eps": eps,
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
            norm=norm,
            backend=backend,
            **precision,
        )

    def accumulator(self, group: dict[str, Any]) -> tuple[float, float, float]:
        """(beta1, keep, admit)."""
        beta1, beta2 = map(float, group["betas"])
        return beta1, beta2, float(group["reweight"]) * (1 - beta2)

    def check_betas(self, group: dict[str, Any]) -> None:
        """Refuses decay rates that make no sense."""
        check_betas(group["betas"])


class AdamDNorm(AdamNorm):
    """AdamD-Norm: `pysmooth.AdamNorm` that divides by the accumulator of the step before.

    Equivalent to `pysmooth.AdamNorm` with delayed=True; state, arguments and errors as there.

    Source: arXiv:2406.04443, algorithms 1 and 2.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, b_init: float, **kwargs: Any
    ) -> None:
        super().__init__(params, lr, b_init=b_init, delayed=True, **kwargs)
