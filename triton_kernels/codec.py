"""codec: compressors that look at one coordinate, given a scale. Twin of csrc/core/codec.h.

Those that draw random numbers have no kernel yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rule import ABS, NOTHING

KINDS = 3  # identity, scaled sign, hard threshold


@triton.jit
def scaled_sign(x, scale):
    """scale, or -scale where x < 0."""
    return tl.where(x >= 0, scale, -scale)


@triton.jit
def codec(x, kind, level, scale):
    """C(x)."""
    kept = tl.where(tl.abs(x) >= level, x, 0.0)
    return tl.where(kind == 1, scaled_sign(x, scale), tl.where(kind == 2, kept, x))


def codec_sum(kind: float) -> int:
    """What is summed up for a codec's scale."""
    return ABS if kind == 1 else NOTHING
