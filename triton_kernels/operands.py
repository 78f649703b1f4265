"""Where the operands of a chunk are, and how they are brought into registers and back.

Kernels find everything through tables of 64-bit integers (table.py): addresses, sizes, strides. An
operand that is one dense block at a 16-byte boundary is accessed 16 bytes at a time. For that the
compiler has to know that a vector is never cut by the mask: the body of a tensor ends at a multiple
of 16 elements, and the last few are a block of their own.

What is not stored as it is computed with, 16-bit numbers and parameters that are kept in two
tensors, is made here; a rule sees none of it. Twin of csrc/cpu/staging.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .how import KAHAN, MASTER
from .ops import gradient_in, narrow, narrow_noisy, noise, widen, word
from .table import (
    BLOCK_NUMBERS,
    KEY_WORDS,
    ROW_BLOCKS,
    ROW_COEFS,
    ROW_LAYOUT,
    ROW_NUMEL,
    ROW_PARAM,
    ROW_ROWS,
    ROW_RUN,
    ROW_WORDS,
)

TAIL = tl.constexpr(16)
# A row of constants: what gradient_in() takes, if this is the first step, what prepare() returned.
OWN = tl.constexpr(3)
CONSTANTS = tl.constexpr(16)


@triton.jit
def pointer(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer to T."""
    if ALIGNED:
        return tl.multiple_of(address.to(tl.pointer_type(T)), 16)
    else:
        return address.to(tl.pointer_type(T))


@triton.jit
def operands(row, gradient, HOW: tl.constexpr):
    """Pointers to a tensor's operands, of which the gradient's address comes from elsewhere."""
    COUNT: tl.constexpr = HOW.count
    out = ()
    for k in tl.static_range(COUNT):
        if k == 1 or HOW.alone:
            out = out + (pointer(gradient, HOW.types[k], HOW.aligned),)
        else:
            out = out + (pointer(tl.load(row + ROW_PARAM + k), HOW.types[k], HOW.aligned),)
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
def fetch(at, where, mask, K: tl.constexpr, HOW: tl.constexpr):
    """Operand K of a block of elements."""
    return widen(tl.load(at[K] + where[K], mask=mask, other=0), HOW.compute)


@triton.jit
def read(at, where, mask, HOW: tl.constexpr):
    """Parameter, gradient and states of a block of elements; zeros for what is not read."""
    COUNT: tl.constexpr = 2 + HOW.states
    out = ()
    for k in tl.static_range(COUNT):
        if ((HOW.reads >> k) & 1) == 0:
            out = out + (tl.zeros(mask.shape, HOW.compute),)
        elif k == 0 and HOW.kept == MASTER:
            out = out + (fetch(at, where, mask, HOW.held, HOW),)
        elif k == 0 and HOW.kept == KAHAN:
            rest = fetch(at, where, mask, HOW.held, HOW)
            out = out + (fetch(at, where, mask, k, HOW) + rest,)
        else:
            out = out + (fetch(at, where, mask, k, HOW),)
    return out


@triton.constexpr_function
def before(bits, k):
    """How many of the bits below bit k are set."""
    return (bits & ((1 << k) - 1)).bit_count()


@triton.jit
def by_chance(x, o, key, K: tl.constexpr, HOW: tl.constexpr):
    """Operand K, rounded at random. Turns take the lower half of a word, its upper half, the next.

    `o`: the elements' numbers, in the order that the tensor is walked in.
    """
    TURN: tl.constexpr = HOW.turn + before(HOW.noisy, K)
    first = word(key[0].to(tl.uint64) + TURN // 2 * 0x9E3779B9)
    random = (noise(word(o), first, key[1]) >> (TURN % 2 * 16)) & 0xFFFF
    return narrow_noisy(x, random)


@triton.jit
def split(x, T: tl.constexpr):
    """Kahan's: what a 16-bit parameter keeps of x, and what its companion keeps of the rest."""
    q = widen(narrow(x, T), tl.float32)
    y = tl.where(q - q == 0, q + widen(narrow(x - q, T), tl.float32), x)
    stored = narrow(y, T)
    p = widen(stored, tl.float32)
    return stored, narrow(tl.where(p - p == 0, y - p, 0.0), T)


@triton.jit
def write(at, where, mask, values, o, key, WRITES: tl.constexpr, HOW: tl.constexpr):
    """Stores those of WRITES."""
    COUNT: tl.constexpr = 2 + HOW.states
    for k in tl.static_range(COUNT):
        if (WRITES >> k) & 1:
            if (HOW.noisy >> k) & 1:
                tl.store(at[k] + where[k], by_chance(values[k], o, key, k, HOW), mask=mask)
            elif k == 0 and HOW.kept == KAHAN:
                kept, rest = split(values[0], HOW.types[0])
                tl.store(at[0] + where[0], kept, mask=mask)
                tl.store(at[HOW.held] + where[HOW.held], rest, mask=mask)
            else:
                tl.store(at[k] + where[k], narrow(values[k], HOW.types[k]), mask=mask)
            if k == 0 and HOW.kept == MASTER:
                tl.store(at[HOW.held] + where[HOW.held], values[0], mask=mask)


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


@triton.jit
def tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW: tl.constexpr):
    """All there is to know of a tensor: operands, layout, constants, noise ...; and its size."""
    row, numel = row_of(tensors, t)
    at = operands(row, tl.load(gradients + t), HOW)
    h = constants(numbers + t * CONSTANTS, OWN + HOW.numbers, HOW.compute)
    key = constants(keys + t * KEY_WORDS, KEY_WORDS, tl.uint32) + (word(t),)
    blocks = ()
    if HOW.span != 0:
        blocks = (tl.load(row + ROW_BLOCKS).to(tl.pointer_type(HOW.compute)),)
    rows = ()
    if HOW.rows:
        coefs = tl.load(row + ROW_COEFS).to(tl.pointer_type(HOW.compute))
        rows = (coefs, tl.load(row + ROW_RUN), tl.load(row + ROW_ROWS))
    return (at, layouts + tl.load(row + ROW_LAYOUT), h, key, blocks, rows), numel


@triton.jit
def take(tensor, o, mask, HOW: tl.constexpr):
    """Elements `o` as a rule sees them: where they are, parameter, gradient, states."""
    where = locate(o, tensor[1], HOW.dims, HOW.count)
    x = read(tensor[0], where, mask, HOW)
    g = x[1]
    if HOW.rows:
        coefs, run, rows = tensor[5]
        g = g * tl.load(coefs + o // run % rows, mask=mask, other=0)
    g = gradient_in(g, tensor[2][0], tensor[2][1], HOW.zero)
    return where, x[0], g, x[2:]


@triton.jit
def constants_at(tensor, o, mask, HOW: tl.constexpr):
    """A rule's constants, for elements `o`."""
    if HOW.per_block == 0:
        return tensor[2][OWN:]
    else:
        COUNT: tl.constexpr = HOW.numbers
        at = tensor[4][0] + o // HOW.span * BLOCK_NUMBERS
        out = ()
        for i in tl.static_range(COUNT):
            if (HOW.per_block >> i) & 1:
                place = at + before(HOW.per_block, i)
                out = out + (tl.load(place, mask=mask, other=0),)
            else:
                out = out + (tensor[2][OWN + i],)
        return out


@triton.jit
def sweep(BODY: tl.constexpr, tensor, more, index, numel, HOW: tl.constexpr):
    """Takes a chunk through body(tensor, more, first, o, limit, sums, count, HOW), block by block.

    Returns the sum, over all blocks, of what body made of `sums`; and `count`, which it hands on.
    """
    VECTOR: tl.constexpr = HOW.vector
    BLOCK: tl.constexpr = HOW.block  # Triton 3.6 takes no attribute for an element of a shape
    begin = index.to(tl.int64) * HOW.chunk
    end = tl.minimum(begin + HOW.chunk, numel)
    sums = tl.zeros([BLOCK], tl.float64)
    rest = tl.zeros([TAIL], tl.float64)
    count = tl.full((), 0, tl.int32)
    limit = numel
    if HOW.aligned:
        limit = numel // 16 * 16
    for i in range(0, (end - begin).to(tl.int32), HOW.block):
        o = begin + i + tl.arange(0, HOW.block)
        if HOW.aligned:
            o = tl.max_contiguous(o, VECTOR)
        sums, count = BODY(tensor, more, begin + i, o, limit, sums, count, HOW)
    if HOW.aligned:
        if end > limit:
            o = limit + tl.arange(0, TAIL)
            rest, count = BODY(tensor, more, limit, o, numel, rest, count, HOW)
    return tl.sum(sums, axis=0) + tl.sum(rest, axis=0), count
