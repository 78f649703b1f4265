"""Block sizes and warps, in one table. Reasoned, not measured: no GPU has run them yet.

A thread should have 64 to 128 bytes of loads under way, whatever the number of streams: that
covers the latency of device memory at the occupancy that a streaming kernel has. Four warps are
enough where each of them does; more only make short tensors waste more of a program.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from .table import CHUNK

# The interpreter runs the kernels on the CPU, in numpy: what costs there is the number of
# operations, not their size.
INTERPRETED = bool(triton.knobs.runtime.interpret)
WHOLE_CHUNKS = INTERPRETED  # one block a chunk, whatever its streams


class Shape(NamedTuple):
    """Elements of a block, and the warps that share it."""

    block: int
    warps: int


def shape_for(streams: int, *, strided: bool = False, wide: bool = False) -> Shape:
    """For a pass over so many streams of 4 bytes (8: `wide`) per element."""
    if WHOLE_CHUNKS:
        return Shape(CHUNK, 4)
    if strided:
        return Shape(512, 4)  # an offset of 64 bits per element and stream needs registers too
    if streams == 1:
        return Shape(2048, 4)  # 16 elements a thread: with more, registers leave room for few warps
    # 16, 8 elements a thread and stream; half as many of 8 bytes, which also fill two registers.
    return Shape((2048 if streams == 2 else 1024) // (2 if wide else 1), 4)


# Tensors that one program of finalize takes, and the partial sums that it folds at a time: each
# program folds all of a unit, so few programs with long rows.
FINALIZE_ROWS = 32
FINALIZE_SPAN = 1024
FINALIZE_ROW_SPAN = 32
FINALIZE_WARPS = 4
