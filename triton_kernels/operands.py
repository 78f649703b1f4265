"""Where the operands of a chunk are: parameter, gradient, states, numbered in this order.

Kernels find everything through tables of 64-bit integers (table.py): addresses, sizes, strides. An
operand that is one dense block at a 16-byte boundary is accessed 16 bytes at a time. For that the
compiler has to know that a vector is never cut by the mask: the body of a tensor ends at a multiple
of 16 elements, and the last few are a block of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ops import narrow, narrow_noisy, noise, widen, word
from .table import ROW_NUMEL, ROW_PARAM, ROW_WORDS

TAIL = tl.constexpr(16)


@triton.jit
def pointer(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer to T."""
    if ALIGNED:
        return tl.multiple_of(address.to(tl.pointer_type(T)), 16)
    else:
        return address.to(tl.pointer_type(T))


@triton.jit
def operands(
    row,
    gradient,
    TYPES: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Pointers to a tensor's operands, of which the gradient's address comes from elsewhere.

    ALONE: the gradient is all there is, and is what the rule changes.
    """
    out = ()
    for k in tl.static_range(COUNT):
        if k == 1 or ALONE:
            out = out + (pointer(gradient, TYPES[k], ALIGNED),)
        else:
            out = out + (pointer(tl.load(row + ROW_PARAM + k), TYPES[k], ALIGNED),)
    return out


@triton.jit
def same(o, COUNT: tl.constexpr):
    """The offset of every operand where all are linear."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (o,)
    return out


@triton.jit
def advance(at, index, strides, COUNT: tl.constexpr):
    """Offsets, further by so many steps along a dimension."""
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (at[k] + index * tl.load(strides + k),)
    return out


@triton.jit
def locate(o, layout, DIMS: tl.constexpr, COUNT: tl.constexpr):
    """Offsets of elements by their number.

    A layout has, per dimension, innermost first, its size and the stride of every operand.
    """
    if DIMS == 0:
        return same(o, COUNT)
    else:
        rest = o
        at = same(o * 0, COUNT)
        for d in tl.static_range(DIMS):
            size = tl.load(layout + d * (COUNT + 1))
            at = advance(at, rest % size, layout + d * (COUNT + 1) + 1, COUNT)
            rest = rest // size
        return at


@triton.jit
def read(
    at,
    where,
    mask,
    READS: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
):
    """The operands of a block of elements, as C; zeros for those that are not read."""
    out = ()
    for k in tl.static_range(COUNT):
        if (READS >> k) & 1:
            out = out + (widen(tl.load(at[k] + where[k], mask=mask, other=0), C),)
        else:
            out = out + (tl.zeros(mask.shape, C),)
    return out


@triton.constexpr_function
def before(bits, k):
    """How many of the bits below bit k are set."""
    return (bits & ((1 << k) - 1)).bit_count()


@triton.jit
def sixteen(o, key, TURN: tl.constexpr):
    """Noise of 16 bits. Turns take the lower half of a word, its upper half, those of the next."""
    first = word(key[0].to(tl.uint64) + TURN // 2 * 0x9E3779B9)
    return (noise(word(o), first, key[1]) >> (TURN % 2 * 16)) & 0xFFFF


@triton.jit
def write(
    at,
    where,
    mask,
    values,
    o,
    key,
    WRITES: tl.constexpr,
    NOISY: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Stores them, those of NOISY rounded at random, by turns."""
    for k in tl.static_range(COUNT):
        if (WRITES >> k) & 1:
            if (NOISY >> k) & 1:
                kept = narrow_noisy(values[k], sixteen(o, key, before(NOISY, k)))
            else:
                kept = narrow(values[k], at[k].dtype.element_ty)
            tl.store(at[k] + where[k], kept, mask=mask)


@triton.jit
def constants(row, COUNT: tl.constexpr, C: tl.constexpr):
    """COUNT numbers of a table, as C."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(row + i).to(C),)
    return out


@triton.jit
def row_of(tensors, t):
    """A tensor's row, and how many elements it has."""
    row = tensors + t.to(tl.int64) * ROW_WORDS
    return row, tl.load(row + ROW_NUMEL)
