"""finalize: what a compressor with a scale per block scales each block by.

The values of a pass are evaluated once more: they are read after they were written, in whole
blocks, whatever the pass took at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compress import DITHERED, scales
from .how import How  # noqa: F401 - what HOW is
from .operands import OWN, take, tensor_of
from .table import BLOCK_NUMBERS


@triton.jit
def block_scales(
    tensors,
    gradients,
    layouts,
    chunk_tensor,
    chunk_index,
    numbers,
    keys,
    go,
    HOW: tl.constexpr,
    LEVEL: tl.constexpr,
    PLACE: tl.constexpr,
):
    """The norm of each of a few blocks, or of one, as a scale and its inverse."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    if (tl.load(gradients + t) != 0) & (tl.load(go) != 0):
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        WIDTH: tl.constexpr = min(HOW.span, HOW.block)
        ROWS: tl.constexpr = HOW.block // WIDTH
        begin = tl.load(chunk_index + c).to(tl.int64) * (ROWS * HOW.span)
        total = tl.zeros([ROWS], tl.float64)
        for i in range(HOW.span // WIDTH):
            o = begin + i * HOW.block + tl.arange(0, HOW.block)
            mask = o < numel
            _, _, g, s = take(tensor, o, mask, HOW)
            x = tl.where(mask, HOW.again(g, s).to(tl.float64), 0.0)
            total += tl.sum(tl.reshape(x * x, [ROWS, WIDTH]), axis=1)
        level = tensor[2][OWN + LEVEL].to(tl.float64)
        wide = tl.full((), 1 if HOW.compute == tl.float64 else 0, tl.int32)
        scale, inverse = scales(DITHERED, level, tl.sqrt(total), wide)
        block = begin // HOW.span + tl.arange(0, ROWS)
        at = tensor[4][0] + block * BLOCK_NUMBERS + PLACE
        there = block * HOW.span < numel
        tl.store(at, scale.to(HOW.compute), mask=there)
        tl.store(at + 1, inverse.to(HOW.compute), mask=there)
