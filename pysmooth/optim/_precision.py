"""In which precision states are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_state_dtype(group: dict[str, Any]) -> None:
    """Refuses a `state_dtype` that is unknown, or does not go with the group's parameters."""
    dtype = group["state_dtype"]
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16; got {dtype}")
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else params
    for p in (p[1] if isinstance(p, tuple) else p for p in params):
        if not isinstance(p, Tensor) or dtype is None:
            continue
        if p.is_complex() and dtype == torch.bfloat16:
            raise ValueError("state_dtype=torch.bfloat16 does not go with complex parameters")
        if p.dtype in (torch.float64, torch.complex128):
            raise ValueError(f"state_dtype={dtype} does not go with {p.dtype} parameters")


def low_states(group: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """Those of the states that the group keeps in bfloat16."""
    return keys if group["state_dtype"] == torch.bfloat16 else ()
