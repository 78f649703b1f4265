"""finalize: how the numbers of chunks are combined, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import MAX, larger, largest


@triton.jit
def fold(values, first, last, KIND: tl.constexpr, SPAN: tl.constexpr):
    """Combines the partials of chunks [first, last)."""
    total = tl.zeros([SPAN], tl.float64)
    for i in range(first, last, SPAN):
        o = i + tl.arange(0, SPAN)
        x = tl.load(values + o, mask=o < last, other=0)
        if KIND == MAX:
            total = larger(x, total)
        else:
            total += x
    if KIND == MAX:
        return largest(total)
    else:
        return tl.sum(total, axis=0)


@triton.jit
def fold_rows(values, first, count, KIND: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The same for chunks [first, first + count) of several tensors at once."""
    total = tl.zeros([ROWS, SPAN], tl.float64)
    for i in range(0, tl.max(count, axis=0), SPAN):
        o = i + tl.arange(0, SPAN)[None, :]
        x = tl.load(values + first[:, None] + o, mask=o < count[:, None], other=0)
        if KIND == MAX:
            total = larger(x, total)
        else:
            total += x
    if KIND == MAX:
        spoiled = tl.max((total != total).to(tl.int32), axis=1)
        return tl.where(
            spoiled != 0, float("nan"), tl.max(tl.where(total == total, total, 0.0), axis=1)
        )
    else:
        return tl.sum(total, axis=1)


@triton.jit
def any_flag(flags, first, last, BIT: tl.constexpr, SPAN: tl.constexpr):
    """Whether a flag is set for one of the chunks [first, last)."""
    found = tl.zeros([SPAN], tl.int32)
    for i in range(first, last, SPAN):
        o = i + tl.arange(0, SPAN)
        found |= tl.load(flags + o, mask=o < last, other=0)
    return tl.max(found & BIT, axis=0)


@triton.jit
def any_flag_rows(flags, first, count, BIT: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The same for chunks of several tensors at once."""
    found = tl.zeros([ROWS, SPAN], tl.int32)
    for i in range(0, tl.max(count, axis=0), SPAN):
        o = i + tl.arange(0, SPAN)[None, :]
        found |= tl.load(flags + first[:, None] + o, mask=o < count[:, None], other=0)
    return tl.max(found & BIT, axis=1)


@triton.jit
def least_rows(values, first, count, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The least of the numbers, at most 1, of chunks [first, first + count); NaN wins."""
    least = tl.full([ROWS, SPAN], 1.0, tl.float64)
    for i in range(0, tl.max(count, axis=0), SPAN):
        o = i + tl.arange(0, SPAN)[None, :]
        x = tl.load(values + first[:, None] + o, mask=o < count[:, None], other=1.0)
        least = tl.where((x < least) | (x != x), x, least)
    spoiled = tl.max((least != least).to(tl.int32), axis=1)
    lowest = tl.min(tl.where(least == least, least, 1.0), axis=1)
    return tl.where(spoiled != 0, float("nan"), lowest)
