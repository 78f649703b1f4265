"""compress: C(x) by one coordinate and a scale. Twin of csrc/core/compress.h."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from .draw import BITS
from .rule import ABS, NOTHING, SQUARES

# identity, scaled sign, hard threshold, QSGD, natural; in place of one, that some are selected
SIGN, THRESHOLD, DITHERED, NATURAL, MARKED = (tl.constexpr(n) for n in range(1, 6))


@triton.jit
def scaled_sign(x, scale):
    """scale, or -scale where x < 0."""
    return tl.where(x >= 0, scale, -scale)


@triton.jit
def digits(x, drawn, WORD: tl.constexpr, DIGITS: tl.constexpr, EXPONENT: tl.constexpr):
    """See natural()."""
    bits = x.to(WORD, bitcast=True)
    cut = bits & ((1 << DIGITS) - 1)
    down = bits - cut
    kept: tl.constexpr = WORD.primitive_bitwidth - DIGITS
    out = tl.where((drawn >> kept) < cut, down + (1 << DIGITS), down)
    out = tl.where((out & EXPONENT) == EXPONENT, down, out)  # an overflow
    out = tl.where((bits & EXPONENT) == EXPONENT, bits, out)  # infinity, NaN
    return out.to(x.dtype, bitcast=True)


@triton.jit
def natural(x, drawn):
    """One of the two powers of two next to |x|, with x's sign."""
    if x.dtype == tl.float64:
        return digits(x, drawn, tl.uint64, 52, 0x7FF0000000000000)
    else:
        return digits(x, drawn, tl.uint32, 23, 0x7F800000)


@triton.jit
def uniform(drawn):
    """Bits as numbers in [0, 1)."""
    if drawn.dtype == tl.uint64:
        return ((drawn >> 12) | 0x3FF0000000000000).to(tl.float64, bitcast=True) - 1.0
    else:
        return ((drawn >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def dithered_steps(x, drawn, inverse, levels):
    """How many steps: one of the two integers next to |x| * inverse."""
    y = tl.where(x < 0, -x, x) * inverse
    y = tl.where(y > levels, levels, y)
    low = tl.floor(y)
    return tl.where(uniform(drawn) < y - low, low + 1.0, low)


@triton.jit
def dithered(x, drawn, step, inverse, levels):
    """One of the two multiples of step next to |x|, with x's sign."""
    sent = dithered_steps(x, drawn, inverse, levels) * step
    return tl.where(x < 0, -sent, sent)


@triton.jit
def compress(x, kind, level, scale, inverse, drawn):
    """C(x). `drawn`: random bits; for MARKED a number, 0 where x is not sent; or None."""
    if drawn is None:
        kept = tl.where(tl.abs(x) >= level, x, 0.0)
        return tl.where(kind == SIGN, scaled_sign(x, scale), tl.where(kind == THRESHOLD, kept, x))
    elif drawn.dtype.is_floating():
        return tl.where(drawn != 0, x * scale, 0.0)
    else:
        rounded = dithered(x, drawn, scale, inverse, level)
        return tl.where(kind == DITHERED, rounded, natural(x, drawn))


@triton.jit
def scales(kind, level, value, wide):
    """What compress() is given as scale and inverse, of what was summed up.

    A step that is too small for a normal number is 0, and none is infinite.
    """
    tiny = tl.where(wide != 0, 2.2250738585072014e-308, 1.1754943508222875e-38)
    most = tl.where(wide != 0, 1.7976931348623157e308, 3.4028234663852886e38)
    step = value / level
    bounded = tl.where(step > most, most, step)
    dithers = kind == DITHERED
    scale = tl.where(step < tiny, 0.0, bounded)
    inverse = tl.where(step < tiny, 0.0, 1.0 / bounded)
    return tl.where(dithers, scale, value), tl.where(dithers, inverse, 0.0)


def compress_sum(kind: float) -> int:
    """What is summed up for a compressor's scale."""
    return {SIGN.value: ABS, DITHERED.value: SQUARES}.get(int(kind), NOTHING)


def compress_draw(hyper: Sequence[float]) -> int:
    """What is drawn, given the four hyper-parameters that describe a compressor."""
    return BITS.value if hyper[0] in (DITHERED.value, NATURAL.value) else 0
