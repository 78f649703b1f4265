"""What rules and drivers compute with. Twin of csrc/core/rule.h and csrc/core/random.h.

bfloat16 is handled as bits, in unsigned 16-bit integers: its rounding is then the same arithmetic
on every GPU and in the interpreter. What is not to be compiled is behind an `else`: code after an
early return is compiled all the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """A / b, rounded to nearest. Plain `/` is an approximation in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def power(base, exponent):
    """base^exponent for 0 <= base and exponent > 0, in float64."""
    return tl.exp2(tl.log2(base) * exponent)


@triton.jit
def sign_of(x):
    """-1, 0 or 1. Zeros keep their sign, NaN passes through."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def gradient_in(g, coef, bound, ZERO: tl.constexpr):
    """What becomes of a gradient before its rule sees it. A bound that is negative or NaN: none."""
    if ZERO:
        g = tl.where(g - g == 0, g, 0.0)  # the difference is NaN for what is not finite
    g = g * coef
    limit = tl.where(bound >= 0, bound, float("inf"))
    return tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))


@triton.jit
def magnitude(x, WIDE: tl.constexpr):
    """|x| as an integer that orders finite numbers; infinities come above them, NaN above all."""
    if WIDE:
        return x.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


# ---- 16-bit numbers ------------------------------------------------------------------------------


@triton.jit
def widen(x, C: tl.constexpr):
    """A number as it is stored, as the type C that is computed in."""
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(C)
    else:
        return x.to(C)


@triton.jit
def narrow(x, T: tl.constexpr):
    """A number as the type T that it is stored in, rounded to nearest even."""
    if tl.uint16 == T:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.uint16)
    else:
        return x.to(T)


@triton.jit
def narrow_noisy(x, random):
    """A float32 number as bfloat16, rounded up with the probability of what is cut off.

    `random` is below 2^16. Infinities and NaN stay.
    """
    bits = x.to(tl.uint32, bitcast=True)
    special = (bits & 0x7F800000) == 0x7F800000
    return (tl.where(special, bits, bits + random) >> 16).to(tl.uint16)


# ---- random numbers ------------------------------------------------------------------------------

NOISE_STRIDE = tl.constexpr(0x9E3779B9)


@triton.jit
def word(x):
    """As a 32-bit word."""
    return x.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four words for a counter of four words and a key of two."""
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = word(b >> 32) ^ c1 ^ k0
        c2 = word(a >> 32) ^ c3 ^ k1
        c1 = word(b)
        c3 = word(a)
        k0 = word(k0.to(tl.uint64) + 0x9E3779B9)
        k1 = word(k1.to(tl.uint64) + 0xBB67AE85)
    return c0, c1, c2, c3


@triton.jit
def mix32(x):
    """A hash of a word."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(step, tensor):
    """The two words that a tensor's noise depends on in a step."""
    zero = word(tensor * 0)
    first, second, _, _ = philox(
        zero, zero, word(step), word(tensor), zero + 0x6A09E667, zero + 0xBB67AE85
    )
    return first, second


@triton.jit
def noise(place, first, second):
    """32 bits for every element, `place` being its number in the order of the walk."""
    x = (place * NOISE_STRIDE) ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D + second
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
