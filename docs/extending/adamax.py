"""Adamax with the clip inside the step."""

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
from ._validate import check_number
from .adam import check_betas


class Adamax(FusedOptimizer):
    """Adam with a decaying maximum in the place of the second moment.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            step += 1
            g = clip(p.grad) + weight_decay * p
            exp_avg = beta1 * exp_avg + (1 - beta1) * g
            exp_inf = maximum(beta2 * exp_inf, abs(g) + eps)
            p = p - lr / (1 - beta1**step) * exp_avg / exp_inf

    With `max_norm=None` it is `torch.optim.Adamax`, and state dicts load both ways.

    State: `exp_avg` and `exp_inf`, 8 bytes per parameter together (float32 also for 16-bit
    parameters), 16 for float64; `step`, float32 of shape ().

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        betas: decay rates of the moment and of the maximum, each in [0, 1).
        eps: added to the magnitude of the gradient, at least 0.
        weight_decay: added to the clipped gradient, times the parameter; at least 0.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend:
            the clip inside the step and what goes with it, as in `pysmooth.ClipSGD`.
        maximize: ascend instead of descend.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:1412.6980, section 7.1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
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
            norm_type=norm_type,
            norm=norm,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name])
        check_betas(group["betas"])
        check_clip(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        return Recipe(
            "adamax",
            tuple(map(float, numbers)),
            ("exp_avg", "exp_inf"),
            clip_spec(group),
            counts_steps=True,
        )
