"""State memory: which dtype a state has, and how it is allocated."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(param: Tensor) -> torch.dtype:
    """float32 for 16-bit parameters (a bfloat16 sum of ones stops at 256), else the parameter's."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return param.dtype


def empty_state(param: Tensor) -> Tensor:
    """An uninitialised state for `param`: its shape, its strides where they are dense."""
    return torch.empty_like(
        param, dtype=state_dtype(param), memory_format=torch.preserve_format, requires_grad=False
    )
