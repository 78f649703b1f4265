"""What tests of numbers that are rounded to bfloat16 share."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to float32 ones, towards 0 and away from it."""
    bits = x.view(torch.int32)
    low = bits & ~0xFFFF
    high = torch.where(bits == low, low, low + 0x10000)
    return low.view(torch.float32), high.view(torch.float32)


def is_neighbour(found: Tensor, x: Tensor) -> bool:
    """Whether bfloat16 numbers are next to float32 ones, on either side."""
    low, high = neighbours(x)
    return bool(((found.float() == low) | (found.float() == high)).all())
