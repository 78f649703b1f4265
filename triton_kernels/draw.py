"""Random numbers for every element. Twin of csrc/cpu/draw.cpp and csrc/core/math/normal.h.

Element i, in the order that its tensor is walked in, gets word i mod 4 of block i div 4: blocks are
computed once for their four elements, and their words then put in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ops import philox, root, word

# What is drawn. Values as in csrc/core/rule.h.
BITS = tl.constexpr(1)  # as many as there are in what is computed in, as an unsigned integer
NORMAL = tl.constexpr(2)  # standard normal numbers, the same float32 numbers in float64
# Not drawn, but handed to a rule in the same place: the marks of coordinates, as numbers.
MARKS = tl.constexpr(3)


@triton.jit
def blocks(first, key, second, N: tl.constexpr):
    """The four words of each of the blocks that N elements need, from a multiple of 4 on."""
    block = (first // 4 + tl.arange(0, N // 4)).to(tl.uint64)
    same = word(block) * 0
    return philox(
        word(block), word(block >> 32), same + key[2], same + (key[5] | second), key[3], key[4]
    )


@triton.jit
def in_order(a, b, c, d):
    """A0 b0 c0 d0 a1 b1 ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def drawn(first, key, N: tl.constexpr, HOW: tl.constexpr):
    """A number, or bits, for each of N elements from `first` on."""
    none = key[5] * 0
    a, b, c, d = blocks(first, key, none, N)
    if HOW.draws == NORMAL:
        a, b = box_muller(a, b)
        c, d = box_muller(c, d)
        return in_order(a, b, c, d).to(HOW.compute)
    elif HOW.compute == tl.float64:
        e, f, g, h = blocks(first, key, none + 0x80000000, N)
        upper = in_order(a, b, c, d).to(tl.uint64) << 32
        return upper | in_order(e, f, g, h).to(tl.uint64)
    else:
        return in_order(a, b, c, d)


@triton.jit
def whole(x):
    """A word as an integer with a sign, rounded."""
    return x.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def flipped(x, bit):
    """A number whose sign changes where bit 31 is set."""
    return (x.to(tl.uint32, bitcast=True) ^ bit).to(tl.float32, bitcast=True)


@triton.jit
def logarithm(f):
    """(-2 ln(1 + f) + 2 f - f^2) / f^3."""
    y = f * 0.15718919 + -0.25763178
    y = y * f + 0.2625757
    y = y * f + -0.28362402
    y = y * f + 0.33249104
    y = y * f + -0.40004572
    y = y * f + 0.5000162
    return y * f + -0.6666663


@triton.jit
def box_muller(first, second):
    """Two normal numbers from two words."""
    u = (whole(first >> 1) + 0.5) * 4.656612873077393e-10
    bits = u.to(tl.uint32, bitcast=True)
    e = ((bits + (0x40000000 - 0x3F3504F3)) >> 23) - 128
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    cubic = f * logarithm(f)
    radius = root(square * cubic + square - f * 2.0 - whole(e) * 1.3862944)
    turns = (second + 0x20000000) >> 30
    y = whole(second - (turns << 30)) * 1.4629181e-09
    z = y * y
    sine = y * z * ((z * -0.00019517296 + 0.008332178) * z + -0.16666655) + y
    cosine = z * z * ((z * 2.4438448e-05 + -0.0013887368) * z + 0.041666646) - z * 0.5 + 1.0
    odd = (turns & 1) != 0
    across = flipped(tl.where(odd, sine, cosine), ((turns + 1) & 2) << 30)
    along = flipped(tl.where(odd, cosine, sine), (turns & 2) << 30)
    return across * radius, along * radius
