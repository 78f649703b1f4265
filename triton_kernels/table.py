"""Tables: what the kernels know of tensors, in 64-bit words. Twin of core/chunks.h and layout.h.

A row per tensor holds what stays from step to step. What a step may bring anew, the addresses of
gradients and the hyper-parameters, is in one block of words that is sent in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl

# Elements of a chunk: what one program takes. Partial sums are kept per chunk and combined in the
# order of chunks, so results depend on sizes alone.
CHUNK = 8192

# A row: the words that a tensor has.
ROW_NUMEL = tl.constexpr(0)
ROW_PARAM = tl.constexpr(1)  # then the place of the gradient, which is not here, and the states
ROW_STEPS = tl.constexpr(7)  # addresses of numbers; 0: none
ROW_NORM = tl.constexpr(8)
ROW_SCALE = tl.constexpr(9)
ROW_GROUP = tl.constexpr(10)
ROW_FIRST = tl.constexpr(11)  # its first chunk, and how many there are
ROW_CHUNKS = tl.constexpr(12)
ROW_LAYOUT = tl.constexpr(13)  # where its layout starts
ROW_GRAD_LAYOUT = tl.constexpr(14)  # that of its gradient alone
ROW_PICKED = tl.constexpr(15)  # what chosen coordinates are multiplied by; a float64 number
ROW_BLOCKS = tl.constexpr(16)  # address of the constants of its blocks
# Of one that is clipped by rows: how many there are, so many of whose elements are walked one after
# another, elements of a row, address of their coefficients, layouts row after row.
ROW_ROWS = tl.constexpr(17)
ROW_RUN = tl.constexpr(18)
ROW_LENGTH = tl.constexpr(19)
ROW_COEFS = tl.constexpr(20)
ROW_PARAM_ROWS = tl.constexpr(21)
ROW_GRAD_ROWS = tl.constexpr(22)
ROW_COUNTED = tl.constexpr(23)  # 1: an empty part of a larger tensor that takes part in steps
ROW_WORDS = tl.constexpr(24)

# What a tensor's random numbers depend on in a step, in 32-bit words.
KEY_NOISE = tl.constexpr(0)  # two words, for rounding
KEY_STEP = tl.constexpr(2)  # steps before this one
KEY_SEED = tl.constexpr(3)  # two words: of what its rule draws
KEY_WORDS = tl.constexpr(5)

# A unit of a selection (select.py): 64-bit integers.
UNIT_K = tl.constexpr(0)  # how many are wanted
UNIT_FILTER = tl.constexpr(1)  # least magnitude of a candidate
UNIT_FOUND = tl.constexpr(2)  # candidates
UNIT_KEY = tl.constexpr(3)  # magnitude of the last one that is chosen, as far as it is known
UNIT_LEFT = tl.constexpr(4)  # how many of those with this magnitude are chosen
UNIT_SETTLED = tl.constexpr(5)  # 1: that is all of them
UNIT_WORDS = tl.constexpr(8)

# Candidates of a chunk that are kept; where there are more, its values are looked at again.
LIST = tl.constexpr(512)

# A group: 64-bit floats.
GROUP_HYPER = 16  # at most
GROUP_MODE = tl.constexpr(16)  # by rows: 5
GROUP_MAX_NORM = tl.constexpr(17)
GROUP_EPS = tl.constexpr(18)
GROUP_L0 = tl.constexpr(19)
GROUP_L1 = tl.constexpr(20)
GROUP_VALUE = tl.constexpr(21)
GROUP_SIGN = tl.constexpr(22)
GROUP_COUNTS = tl.constexpr(23)  # 1 where its rule accumulates norms
GROUP_WORDS = tl.constexpr(24)

# What a compressor with a scale per block has for each: its scale and the inverse, of two passes.
BLOCK_NUMBERS = tl.constexpr(4)

MAX_DIMS = 16

Dimension = tuple[int, ...]  # size, then the stride of every operand


def walk_order(
    shape: Sequence[int], strides: Sequence[Sequence[int]], *, rows_first: bool = False
) -> list[int]:
    """Dimensions, outermost first: by the first operand's strides; those of size 1 are dropped.

    The order is the CPU backend's: elements get the same numbers. `rows_first`: the first dimension
    is the outermost, wherever it lies.
    """
    dims = [d for d, n in enumerate(shape) if n != 1]
    return sorted(dims, key=lambda d: [not (rows_first and d == 0), *(-abs(s[d]) for s in strides)])


def merge_layout(
    shape: Sequence[int], strides: Sequence[Sequence[int]], *, rows_first: bool = False
) -> list[Dimension]:
    """How operands of one shape lie in memory, relative to each other; innermost dimension first.

    Dimensions are merged where all operands allow it.
    """
    order = walk_order(shape, strides, rows_first=rows_first)
    dims = [(shape[d], *(s[d] for s in strides)) for d in order]
    merged: list[Dimension] = []  # outermost first
    for dim in dims:
        if merged and all(a == b * dim[0] for a, b in zip(merged[-1][1:], dim[1:], strict=True)):
            dim = (merged.pop()[0] * dim[0], *dim[1:])
        merged.append(dim)
    return merged[::-1]


def is_linear(layout: Sequence[Dimension]) -> bool:
    """Whether all operands are dense, and are walked in step."""
    return not layout or (len(layout) == 1 and all(stride == 1 for stride in layout[0][1:]))


def cut(numels: Sequence[int]) -> list[int]:
    """Where each tensor's chunks begin, and at the end how many there are."""
    first = [0]
    for numel in numels:
        first.append(first[-1] + -(-numel // CHUNK))
    return first
