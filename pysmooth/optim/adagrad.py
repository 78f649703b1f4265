"""AdaGrad with the clip inside the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import Recipe
from ._base import FusedOptimizer
from ._clip import Clip, NonFinite, Norm, ScopeName, check_clip, clip_spec
from ._precision import Precision, check_state_dtype, low_states
from ._validate import check_number


class Adagrad(FusedOptimizer):
    """AdaGrad on clipped gradients.

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            step += 1
            g = clip(p.grad) + weight_decay * p
            sum = sum + g * g
            p = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)

    With `max_norm=None` it is `torch.optim.Adagrad`, and state dicts load both ways.

    State: `state[p]["sum"]`, 4 bytes per parameter (float32 also for 16-bit parameters, where a
    16-bit sum would soon stop growing), 8 for float64; `state[p]["step"]`, float32 of shape ().
    Both are allocated in the first step that has a gradient.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        lr_decay: decay of the learning rate with the step count, at least 0.
        weight_decay: added to the clipped gradient, times the parameter; at least 0.
        initial_accumulator_value: what `sum` starts from, at least 0.
        eps: added to the root, at least 0.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, nonfinite, norm_type, norm, backend:
            the clip inside the step and what goes with it, as in `pysmooth.ClipSGD`.
        state_dtype: torch.bfloat16 keeps `sum` in 2 bytes instead of 4, rounded stochastically
            (by a hash of step, tensor and element: runs are reproducible, and the mean is right
            where rounding to nearest would stall). None, or torch.float32: as under State.
        maximize: ascend instead of descend.
        foreach, fused: accepted, because torch.optim.Adagrad has them; without effect.
        differentiable: only False.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: Duchi, Hazan, Singer, JMLR 12 (2011). With the clip, for heavy-tailed noise:
    arXiv:2406.04443.
    """

    groups_say_all = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
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
        differentiable: bool = False,
        fused: bool | None = None,
        **precision: Unpack[Precision],
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not supported: the step writes in place")
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
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

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        for name in ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value"):
            check_number(name, group[name])
        check_clip(group)
        check_state_dtype(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        return Recipe(
            "adagrad",
            (
                float(group["lr"]),
                float(group["lr_decay"]),
                float(group["eps"]),
                float(group["weight_decay"]),
            ),
            ("sum",),
            clip_spec(group),
            counts_steps=True,
            low_states=low_states(group, "sum"),
            init=(float(group["initial_accumulator_value"]),),
        )
