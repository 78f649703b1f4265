"""Adam and AdamW with the clip inside the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend, is_capturable
from ..engine.recipe import Recipe
from ._base import FusedOptimizer
from ._clip import Clip, NonFinite, Norm, ScopeName, check_clip, clip_spec
from ._precision import Precision, check_state_dtype, low_states
from ._validate import check_flag, check_number


class Adam(FusedOptimizer):
    """Adam on clipped gradients.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            step += 1
            g = clip(p.grad) + weight_decay * p
            exp_avg = beta1 * exp_avg + (1 - beta1) * g
            exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
            v = exp_avg_sq          # amsgrad: v = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
            denominator = sqrt(v) / sqrt(1 - beta2**step) + eps
            p = p - lr / (1 - beta1**step) * exp_avg / denominator

    With `max_norm=None` it is `torch.optim.Adam`, and state dicts load both ways.

    State: `exp_avg` and `exp_avg_sq`, 8 bytes per parameter together (float32 also for 16-bit
    parameters), 16 for float64; half as much again with `amsgrad`; `step`, float32 of shape ().

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: added to the clipped gradient, times the parameter; at least 0.
        amsgrad: divide by the largest second moment so far.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend:
            the clip inside the step and what goes with it, as in `pysmooth.ClipSGD`.
        state_dtype: torch.bfloat16 keeps `exp_avg` and `exp_avg_sq` in 2 bytes instead of 4,
            rounded stochastically (by a hash of step, tensor and element: runs are reproducible,
            and the mean is right where rounding to nearest would stall). None, or torch.float32:
            as under State.
        maximize: ascend instead of descend.
        foreach, fused: accepted, because torch's class has them; without effect.
        capturable: asks for a backend whose steps CUDA graphs can capture; all steps of the
            CUDA backend are.
        differentiable: only False.
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` instead (AdamW).
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Sources: arXiv:1412.6980; amsgrad, arXiv:1904.09237; with the clip, arXiv:2406.04443.
    """

    groups_say_all = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
        clip_eps: float = 1e-6,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        norm_type: float = 2.0,
        norm: Norm = "in_step",
        backend: Backend = "auto",
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **precision: Unpack[Precision],
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not supported: the step writes in place")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_norm": max_norm,
            "clip": clip,
            "clip_eps": clip_eps,
            "agc_factor": agc_factor,
            "agc_eps": agc_eps,
            "maximize": maximize,
            "state_dtype": state_dtype,
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
        if capturable and not is_capturable(self.resolved_backend):
            raise ValueError(
                f"capturable=True: steps of backend {self.resolved_backend!r} cannot be captured"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name])
        check_betas(group["betas"])
        check_flag("amsgrad", group["amsgrad"])
        check_flag("decoupled_weight_decay", group["decoupled_weight_decay"])
        check_clip(group)
        check_state_dtype(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        beta1, beta2 = group["betas"]
        states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if group["amsgrad"]:
            states += ("max_exp_avg_sq",)
        return Recipe(
            "adam_amsgrad" if group["amsgrad"] else "adam",
            (
                float(group["lr"]),
                float(beta1),
                float(beta2),
                float(group["eps"]),
                float(group["weight_decay"]),
                float(group["decoupled_weight_decay"]),
            ),
            states,
            clip_spec(group),
            counts_steps=True,
            low_states=low_states(group, "exp_avg", "exp_avg_sq"),
        )


class AdamW(Adam):
    """Adam with decoupled weight decay, on clipped gradients.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            step += 1
            p = p - lr * weight_decay * p
            g = clip(p.grad)
            exp_avg = beta1 * exp_avg + (1 - beta1) * g
            exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
            v = exp_avg_sq          # amsgrad: v = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
            denominator = sqrt(v) / sqrt(1 - beta2**step) + eps
            p = p - lr / (1 - beta1**step) * exp_avg / denominator

    With `max_norm=None` it is `torch.optim.AdamW`, and state dicts load both ways.

    State: `exp_avg` and `exp_avg_sq`, 8 bytes per parameter together (float32 also for 16-bit
    parameters), 16 for float64; half as much again with `amsgrad`; `step`, float32 of shape ().

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: the parameter shrinks by `lr * weight_decay`, times itself; at least 0.
        amsgrad: divide by the largest second moment so far.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend:
            the clip inside the step and what goes with it, as in `pysmooth.ClipSGD`.
        state_dtype: torch.bfloat16 keeps `exp_avg` and `exp_avg_sq` in 2 bytes instead of 4,
            rounded stochastically (by a hash of step, tensor and element: runs are reproducible,
            and the mean is right where rounding to nearest would stall). None, or torch.float32:
            as under State.
        maximize: ascend instead of descend.
        foreach, fused: accepted, because torch's class has them; without effect.
        capturable: asks for a backend whose steps CUDA graphs can capture; all steps of the
            CUDA backend are.
        differentiable: only False.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Sources: arXiv:1711.05101; amsgrad, arXiv:1904.09237; with the clip, arXiv:2406.04443.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
        clip_eps: float = 1e-6,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        norm_type: float = 2.0,
        norm: Norm = "in_step",
        backend: Backend = "auto",
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            max_norm=max_norm,
            clip=clip,
            scope=scope,
            clip_eps=clip_eps,
            agc_factor=agc_factor,
            agc_eps=agc_eps,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
            maximize=maximize,
            nonfinite=nonfinite,
            norm_type=norm_type,
            norm=norm,
            backend=backend,
            capturable=capturable,
            differentiable=differentiable,
            **precision,
        )


def check_betas(betas: Any) -> None:
    """Refuses anything but two numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers; got {betas!r}")
    for i, beta in enumerate(betas):
        if check_number(f"betas[{i}]", beta) >= 1:
            raise ValueError(f"betas[{i}] must be less than 1; got {float(beta)}")
