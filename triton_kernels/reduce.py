"""reduce: one number per chunk of the gradients, and whether it holds what is not finite.

Sums are taken in float32 (float64 for float64), a lane per place in a block, and the lanes added up
in float64. A chunk whose sum overflowed, or is so small that squares were lost, is summed again in
float64. The partials are combined, in the order of chunks, by finalize.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import locate, pointer, row_of
from .ops import power, widen
from .table import ROW_GRAD_LAYOUT

# What is accumulated. Values as in csrc/cpu/kernels.h.
SQUARES = tl.constexpr(0)
ABS = tl.constexpr(1)
MAX = tl.constexpr(2)
POWER = tl.constexpr(5)

# Bits of a chunk's flag.
SPOILED = tl.constexpr(1)  # holds an infinity or a NaN
PRESENT = tl.constexpr(2)  # takes part in the step


@triton.jit
def larger(a, b):
    """Of two magnitudes; NaN wins."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def largest(x):
    """Of a block of magnitudes; NaN wins."""
    spoiled = tl.max((x != x).to(tl.int32), axis=0)
    return tl.where(spoiled != 0, float("nan"), tl.max(tl.where(x == x, x, 0.0), axis=0))


@triton.jit
def term(x, KIND: tl.constexpr, P: tl.constexpr):
    """What an element adds to the sum."""
    if KIND == SQUARES:
        return x * x
    elif KIND == POWER:
        return power(tl.abs(x).to(tl.float64), P)
    else:
        return tl.abs(x)


@triton.jit
def walk(
    at,
    begin,
    end,
    layout,
    KIND: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over elements [begin, end), in float64, and whether all are finite."""
    total = tl.zeros([BLOCK], tl.float64 if KIND == POWER else C)
    bad = tl.zeros([BLOCK], tl.int32)
    for i in range(0, (end - begin).to(tl.int32), BLOCK):
        o = begin + i + tl.arange(0, BLOCK)
        (where,) = locate(o, layout, DIMS, 1)
        x = widen(tl.load(at + where, mask=o < end, other=0), C)
        if KIND == MAX:
            total = larger(tl.abs(x), total)
        else:
            total += term(x, KIND, P)
        bad |= (x - x != 0).to(tl.int32)
    if KIND == MAX:
        return largest(total.to(tl.float64)), tl.max(bad, axis=0)
    else:
        return tl.sum(total.to(tl.float64), axis=0), tl.max(bad, axis=0)


@triton.jit
def reduce(
    tensors,
    gradients,
    layouts,
    chunk_tensor,
    chunk_index,
    chunk_number,
    partials,
    flags,
    T: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leaves a partial and a flag for one chunk."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    number = tl.load(chunk_number + c)
    address = tl.load(gradients + t)
    if address == 0:
        tl.store(partials + number, 0.0)
        tl.store(flags + number, 0)
    else:
        row, numel = row_of(tensors, t)
        begin = tl.load(chunk_index + c).to(tl.int64) * CHUNK
        layout = layouts + tl.load(row + ROW_GRAD_LAYOUT)
        at = pointer(address, T, ALIGNED)
        end = tl.minimum(begin + CHUNK, numel)
        if ALIGNED:
            # Whole vectors, then the rest.
            body = tl.minimum(begin + CHUNK, numel // 16 * 16)
            total, bad = walk(at, begin, body, layout, KIND, P, C, DIMS, BLOCK)
            more, worse = walk(at, body, end, layout, KIND, P, C, DIMS, 16)
            bad = bad | worse
            if KIND == MAX:
                total = larger(total, more)
            else:
                total += more
        else:
            total, bad = walk(at, begin, end, layout, KIND, P, C, DIMS, BLOCK)
        if KIND < MAX and tl.float32 == C:
            # Squares below 2^-126 lose bits: 8192 of them stay invisible beside a sum of 2^-100.
            LEAST: tl.constexpr = 7.8886090522101181e-31 if KIND == SQUARES else 0.0
            if (total < LEAST) | (total > 3.4028234663852886e38) | (total != total):
                total, bad = walk(at, begin, end, layout, KIND, P, tl.float64, DIMS, BLOCK)
        tl.store(partials + number, total)
        tl.store(flags + number, bad | PRESENT)
