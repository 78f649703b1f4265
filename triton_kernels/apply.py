"""apply: one pass over parameters, gradients and states with a rule's update."""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import TAIL, constants, locate, operands, read, row_of, write
from .ops import gradient_in
from .table import ROW_LAYOUT

# A row of constants: what gradient_in() takes, if this is the first step, what prepare() returned.
OWN = tl.constexpr(3)
CONSTANTS = tl.constexpr(16)


@triton.jit
def block(
    at,
    o,
    end,
    layout,
    h,
    key,
    UPDATE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    NOISY: tl.constexpr,
    ZERO: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Elements `o`, as far as they are below `end`."""
    mask = o < end
    where = locate(o, layout, DIMS, COUNT)
    x = read(at, where, mask, READS, COUNT, C)
    g = gradient_in(x[1], h[0], h[1], ZERO)
    p, s = UPDATE(x[0], g, x[2:], h[OWN:])
    write(at, where, mask, (p, g) + s, o, key, WRITES, NOISY, COUNT)


@triton.jit
def apply(
    tensors,
    gradients,
    layouts,
    chunk_tensor,
    chunk_index,
    numbers,
    keys,
    go,
    TYPES: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    UPDATE: tl.constexpr,
    NUMBERS: tl.constexpr,
    ALONE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    NOISY: tl.constexpr,
    ZERO: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one chunk.

    VECTOR elements at a time: 16 bytes of the widest operand. With more, narrow operands would have
    another arrangement of elements over threads than wide ones, and go through shared memory.
    """
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    address = tl.load(gradients + t)
    wanted = (address != 0) & (tl.load(go) != 0)
    if ALONE:  # a factor of 1 changes nothing
        wanted = wanted & (tl.load(numbers + t * CONSTANTS + OWN) != 1.0)
    if wanted:
        row, numel = row_of(tensors, t)
        begin = tl.load(chunk_index + c).to(tl.int64) * CHUNK
        layout = layouts + tl.load(row + ROW_LAYOUT)
        h = constants(numbers + t * CONSTANTS, OWN + NUMBERS, C)
        key = constants(keys + t * 2, 2, tl.uint32)
        at = operands(row, address, TYPES, COUNT, ALIGNED, ALONE)
        end = tl.minimum(begin + CHUNK, numel)
        if ALIGNED:
            whole = numel // 16
            for i in range(0, (end - begin).to(tl.int32), BLOCK):
                o = tl.max_contiguous(begin + i + tl.arange(0, BLOCK), VECTOR)
                block(
                    at,
                    o,
                    whole * 16,
                    layout,
                    h,
                    key,
                    UPDATE,
                    READS,
                    WRITES,
                    NOISY,
                    ZERO,
                    COUNT,
                    C,
                    DIMS,
                )
            if end > whole * 16:
                o = whole * 16 + tl.arange(0, TAIL)
                block(
                    at, o, numel, layout, h, key, UPDATE, READS, WRITES, NOISY, ZERO, COUNT, C, DIMS
                )
        else:
            for i in range(0, (end - begin).to(tl.int32), BLOCK):
                o = begin + i + tl.arange(0, BLOCK)
                block(
                    at, o, numel, layout, h, key, UPDATE, READS, WRITES, NOISY, ZERO, COUNT, C, DIMS
                )
