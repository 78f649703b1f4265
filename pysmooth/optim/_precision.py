"""In which precision states and parameters are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from ..engine.recipe import ParamStorage
from ._validate import check_choice, check_flag


class Precision(TypedDict, total=False):
    """Arguments of every optimizer: at most one of the first three, for parameters of 16 bits.

    Attributes:
        master_weights: a float32 copy is what steps change, `state[p]["master_param"]`; the
            parameter is written from it, rounded to nearest. 4 bytes per parameter.
        kahan: a second 16-bit number holds what the parameter's rounding lost,
            `state[p]["compensation"]`. 2 bytes per parameter.
        stochastic_rounding: bfloat16 parameters are rounded up or down at random, right in the
            mean. No memory but `state[p]["step"]`.
        amp: who divides gradients by the scale of `torch.amp.GradScaler`. "fused": the step, in
            registers. "external": GradScaler, as for an optimizer that knows nothing of it, for
            callers that clip or look at gradients in between and refuse the former (Lightning's
            `gradient_clip_val`).

    See docs/methods/low-precision.md.
    """

    master_weights: bool
    kahan: bool
    stochastic_rounding: bool
    amp: Literal["fused", "external"]


_STORAGE = {
    "master_weights": ParamStorage.MASTER,
    "kahan": ParamStorage.KAHAN,
    "stochastic_rounding": ParamStorage.STOCHASTIC,
}


def check_param_storage(group: dict[str, Any]) -> None:
    """Refuses options that exclude each other, or that the group's parameters cannot have."""
    for name in _STORAGE:
        check_flag(name, group[name])
    chosen = [name for name in _STORAGE if group[name]]
    if len(chosen) > 1:
        raise ValueError(f"at most one of {', '.join(_STORAGE)}; got {' and '.join(chosen)}")
    for p in _tensors(group) if chosen else ():
        if p.is_complex():
            raise ValueError(f"{chosen[0]}=True does not go with complex parameters")
        if p.dtype == torch.float16 and chosen == ["stochastic_rounding"]:
            raise ValueError(
                "stochastic_rounding=True does not go with torch.float16 parameters, only with "
                "torch.bfloat16; master_weights=True does"
            )


def param_storage(group: dict[str, Any]) -> ParamStorage:
    """How the group's 16-bit parameters are kept."""
    for name, storage in _STORAGE.items():
        if group[name]:
            return storage
    return ParamStorage.PLAIN


def check_state_dtype(group: dict[str, Any]) -> None:
    """Refuses a `state_dtype` that is unknown, or does not go with the group's parameters."""
    dtype = group["state_dtype"]
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16; got {dtype}")
    if dtype is not None:
        _check_narrow(group, f"state_dtype={dtype}", low=dtype == torch.bfloat16)


def check_residual(group: dict[str, Any]) -> None:
    """Refuses a `residual` that is unknown, or does not go with the group's parameters."""
    if check_choice("residual", group["residual"], ("fp32", "bf16")) == "bf16":
        _check_narrow(group, "residual='bf16'", low=True)


def _check_narrow(group: dict[str, Any], what: str, *, low: bool) -> None:
    for p in _tensors(group):
        if p.is_complex() and low:
            raise ValueError(f"{what} does not go with complex parameters")
        if p.dtype in (torch.float64, torch.complex128):
            raise ValueError(f"{what} does not go with {p.dtype} parameters")


def low_states(group: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """Those of the states that the group keeps in bfloat16."""
    return keys if group["state_dtype"] == torch.bfloat16 else ()


def _tensors(group: dict[str, Any]) -> Iterator[Tensor]:
    """The group's parameters, where they are: torch says what else is wrong."""
    params = group["params"]
    for p in [params] if isinstance(params, Tensor) else params:
        tensor = p[1] if isinstance(p, tuple) else p
        if isinstance(tensor, Tensor):
            yield tensor
