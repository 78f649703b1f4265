"""source: the passes of a rule before apply. A pass keeps what it changes, sums its values up."""

from __future__ import annotations

import triton
import triton.language as tl

from .apply import CONSTANTS, OWN
from .operands import TAIL, constants, locate, operands, read, row_of, write
from .ops import gradient_in
from .table import ROW_LAYOUT


@triton.jit
def begun(s, g, first, STARTS: tl.constexpr, STATES: tl.constexpr):
    """States; in a tensor's first step those of STARTS are the gradient."""
    out = ()
    for k in tl.static_range(STATES):
        if (STARTS >> k) & 1:
            out = out + (tl.where(first != 0, g, s[k]),)
        else:
            out = out + (s[k],)
    return out


@triton.jit
def block(
    at,
    o,
    end,
    layout,
    h,
    key,
    SOURCE: tl.constexpr,
    SUM: tl.constexpr,
    STARTS: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    ZERO: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Elements `o`, as far as they are below `end`; returns what each adds to the sum."""
    mask = o < end
    where = locate(o, layout, DIMS, COUNT)
    x = read(at, where, mask, READS, COUNT, C)
    g = gradient_in(x[1], h[0], h[1], ZERO)
    s = begun(x[2:], g, h[2], STARTS, COUNT - 2)
    value, p, s = SOURCE(x[0], g, s, h[OWN:])
    write(at, where, mask, (p, g) + s, o, key, WRITES, 0, COUNT)
    if (STARTS << 2) & ~WRITES:
        if h[2] != 0:  # once: later steps save the stream
            write(at, where, mask, (p, g) + s, o, key, (STARTS << 2) & ~WRITES, 0, COUNT)
    # In float64: what was read has been written over, so there is no second look at a sum.
    value = tl.where(mask, value.to(tl.float64), 0.0)
    if SUM == 2:
        return value * value
    else:
        return tl.abs(value)


@triton.jit
def source(
    tensors,
    gradients,
    layouts,
    chunk_tensor,
    chunk_index,
    chunk_number,
    numbers,
    keys,
    go,
    sums,
    lengths,
    TYPES: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    SOURCE: tl.constexpr,
    NUMBERS: tl.constexpr,
    SUM: tl.constexpr,
    STARTS: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    ZERO: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Passes over one chunk; leaves its sum, and how many elements went into it."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    number = tl.load(chunk_number + c)
    address = tl.load(gradients + t)
    if (address != 0) & (tl.load(go) != 0):
        row, numel = row_of(tensors, t)
        begin = tl.load(chunk_index + c).to(tl.int64) * CHUNK
        layout = layouts + tl.load(row + ROW_LAYOUT)
        h = constants(numbers + t * CONSTANTS, OWN + NUMBERS, C)
        key = constants(keys + t * 2, 2, tl.uint32)
        at = operands(row, address, TYPES, COUNT, ALIGNED, False)
        end = tl.minimum(begin + CHUNK, numel)
        total = tl.zeros([BLOCK], tl.float64)
        rest = tl.zeros([TAIL], tl.float64)
        if ALIGNED:
            whole = numel // 16
            for i in range(0, (end - begin).to(tl.int32), BLOCK):
                o = tl.max_contiguous(begin + i + tl.arange(0, BLOCK), VECTOR)
                total += block(
                    at,
                    o,
                    whole * 16,
                    layout,
                    h,
                    key,
                    SOURCE,
                    SUM,
                    STARTS,
                    READS,
                    WRITES,
                    ZERO,
                    COUNT,
                    C,
                    DIMS,
                )
            if end > whole * 16:
                o = whole * 16 + tl.arange(0, TAIL)
                rest += block(
                    at,
                    o,
                    numel,
                    layout,
                    h,
                    key,
                    SOURCE,
                    SUM,
                    STARTS,
                    READS,
                    WRITES,
                    ZERO,
                    COUNT,
                    C,
                    DIMS,
                )
        else:
            for i in range(0, (end - begin).to(tl.int32), BLOCK):
                o = begin + i + tl.arange(0, BLOCK)
                total += block(
                    at,
                    o,
                    numel,
                    layout,
                    h,
                    key,
                    SOURCE,
                    SUM,
                    STARTS,
                    READS,
                    WRITES,
                    ZERO,
                    COUNT,
                    C,
                    DIMS,
                )
        if SUM != 0:
            tl.store(sums + number, tl.sum(total, axis=0) + tl.sum(rest, axis=0))
            tl.store(lengths + number, (end - begin).to(tl.float64))
    elif SUM != 0:
        tl.store(sums + number, 0.0)
        tl.store(lengths + number, 0.0)
