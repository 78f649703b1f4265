"""Between processes, where tensors are parts of larger ones. Twin of csrc/cuda/spread.cuh.

After a pass, or after reduce, tell() leaves a row per tensor: what its chunks come to here. These
are added up over the processes that hold parts of the same tensors; adopt() takes them up, and
finalize sees tensors of one chunk each: so the order of sums is the same wherever parts end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finalize import takes_part
from .fold import any_flag_rows, fold_rows, least_rows
from .reduce import MAX, PRESENT, SPOILED, SQUARES
from .table import ROW_CHUNKS, ROW_FIRST, ROW_NUMEL, ROW_WORDS

COLUMNS = tl.constexpr(4)  # of a row: the sum, a flag, whether the tensor takes part, whether not
IS_NAN = tl.constexpr(2.0)  # a flag: the sum is not a number, which a maximum would lose


@triton.jit(do_not_specialize=["members"])
def tell(
    tensors,
    gradients,
    partials,
    flags,
    smallest,
    squares_of,
    rows,
    least,
    squares,
    torn,
    members,
    KIND: tl.constexpr,
    PASS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_SPAN: tl.constexpr,
):
    """A few tensors."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = t < members
    t = tl.where(mask, t, 0)
    row = tensors + t.to(tl.int64) * ROW_WORDS
    first = tl.load(row + ROW_FIRST)
    count = tl.load(row + ROW_CHUNKS)
    total = fold_rows(partials, first, count, KIND, ROWS, ROW_SPAN)
    flag = total * 0.0
    if not PASS:
        bad = any_flag_rows(flags, first, count, SPOILED, ROWS, ROW_SPAN)
        flag = (bad != 0).to(tl.float64)
    if KIND == MAX:
        flag = tl.where(total != total, IS_NAN, flag)
        total = tl.where(total != total, 0.0, total)
    here = takes_part(row, gradients, t).to(tl.float64)
    at = rows + t * COLUMNS
    tl.store(at, total, mask=mask)
    tl.store(at + 1, flag, mask=mask)
    tl.store(at + 2, here, mask=mask)
    tl.store(at + 3, 1.0 - here, mask=mask)
    if BY_ROWS:
        tl.store(least + t, least_rows(smallest, first, count, ROWS, ROW_SPAN), mask=mask)
        tl.store(
            squares + t, fold_rows(squares_of, first, count, SQUARES, ROWS, ROW_SPAN), mask=mask
        )
    if tl.program_id(0) == 0:
        tl.store(torn + 1, 0)


@triton.jit(do_not_specialize=["members"])
def adopt(
    tensors,
    rows,
    partials,
    flags,
    lengths,
    go,
    torn,
    members,
    KIND: tl.constexpr,
    PASS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A few tensors. `torn`: 1 + one that takes part in some processes only; whether one does."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = t < members
    at = rows + t * COLUMNS
    total = tl.load(at, mask=mask, other=0.0)
    flag = tl.load(at + 1, mask=mask, other=0.0)
    here = tl.load(at + 2, mask=mask, other=0.0) != 0
    missing = tl.load(at + 3, mask=mask, other=0.0) != 0
    if KIND == MAX:
        total = tl.where(flag >= IS_NAN, float("nan"), total)
    tl.store(partials + t, total, mask=mask)
    if PASS:
        elements = tl.load(tensors + t.to(tl.int64) * ROW_WORDS + ROW_NUMEL, mask=mask, other=0)
        tl.store(lengths + t, tl.where(here, elements.to(tl.float64), 0.0), mask=mask)
    else:
        found = tl.where(here, PRESENT, 0) | tl.where(flag != 0, SPOILED, 0)
        tl.store(flags + t, found, mask=mask)
    number = tl.max(tl.where(here & missing, t + 1, 0), axis=0)
    if number != 0:
        tl.store(torn, number.to(tl.int64))
        tl.store(torn + 1, 1)
        if PASS:
            tl.store(go, 0)
