"""reduce, for clips by rows: norms of parameter and gradient per row, and a coefficient for each.

Rows are slices along the first dimension. Both tensors are walked row after row, wherever that
dimension lies, so that a chunk holds whole rows and at most two parts. Parts are added in the order
of chunks. Twin of csrc/cpu/rows.cpp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finalize import loss_scale
from .operands import locate, pointer, row_of
from .ops import widen
from .table import (
    CHUNK,
    GROUP_EPS,
    GROUP_MAX_NORM,
    GROUP_WORDS,
    ROW_COEFS,
    ROW_GRAD_ROWS,
    ROW_GROUP,
    ROW_LENGTH,
    ROW_PARAM,
    ROW_PARAM_ROWS,
)

SIZE = tl.constexpr(CHUNK)


@triton.jit
def row_sums(
    tensors,
    gradients,
    layouts,
    chunk_tensor,
    chunk_index,
    chunk_number,
    parts,
    sums,
    T: tl.constexpr,
    C: tl.constexpr,
    OF_GRAD: tl.constexpr,
    DIMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of squares of the parts of rows that a chunk has: a few rows at a time."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    address = tl.load(gradients + t)
    if address != 0:
        row, numel = row_of(tensors, t)
        layout = layouts + tl.load(row + (ROW_GRAD_ROWS if OF_GRAD else ROW_PARAM_ROWS))
        if not OF_GRAD:
            address = tl.load(row + ROW_PARAM)
        at = pointer(address, T, False)
        length = tl.load(row + ROW_LENGTH)
        begin = tl.load(chunk_index + c).to(tl.int64) * SIZE
        end = tl.minimum(begin + SIZE, numel)
        first = begin // length
        count = ((end - 1) // length - first + 1).to(tl.int32)
        out = sums + tl.load(parts + tl.load(chunk_number + c))
        ROWS: tl.constexpr = BLOCK // WIDTH
        for i in range(0, count, ROWS):
            r = i + tl.arange(0, ROWS)
            low = tl.maximum((first + r) * length, begin)
            high = tl.minimum((first + r + 1) * length, end)
            total = tl.zeros([ROWS], tl.float64)
            for j in range(0, tl.max(high - low, axis=0).to(tl.int32), WIDTH):
                o = low[:, None] + j + tl.arange(0, WIDTH)[None, :]
                (where,) = locate(o, layout, DIMS, 1)
                x = widen(tl.load(at + where, mask=o < high[:, None], other=0), C).to(tl.float64)
                total += tl.sum(x * x, axis=1)
            tl.store(out + r, total, mask=r < count)


@triton.jit
def agc_coefficient(group, param_norm, grad_norm):
    """What a row of a gradient is multiplied by. Twin of csrc/core/math/clip.h."""
    eps = tl.load(group + GROUP_EPS)
    norm = tl.where(param_norm < eps, eps, param_norm)
    coef = tl.load(group + GROUP_MAX_NORM) * norm / grad_norm
    return tl.where(grad_norm == 0, 1.0, tl.where(coef > 1.0, 1.0, coef))


@triton.jit
def smaller(a, b):
    """Of two coefficients; NaN wins."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def row_coefs(
    tensors,
    gradients,
    hypers,
    amp,
    chunk_tensor,
    chunk_index,
    chunk_number,
    parts,
    param_sums,
    grad_sums,
    smallest,
    squares,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The coefficients of the rows that begin in a chunk, and what finalize wants of them."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    number = tl.load(chunk_number + c)
    least = tl.full([BLOCK], 1.0, tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    if tl.load(gradients + t) != 0:
        row, numel = row_of(tensors, t)
        group = hypers + tl.load(row + ROW_GROUP) * GROUP_WORDS
        unscale, _ = loss_scale(amp)
        length = tl.load(row + ROW_LENGTH)
        begin = tl.load(chunk_index + c).to(tl.int64) * SIZE
        end = tl.minimum(begin + SIZE, numel)
        first = begin // length
        low = ((begin + length - 1) // length - first).to(tl.int32)
        high = ((end - 1) // length - first + 1).to(tl.int32)
        # The last row may go on: it comes first in the chunks that follow.
        more_param = tl.full((), 0.0, tl.float64)
        more_grad = tl.full((), 0.0, tl.float64)
        until = number + (((first + high) * length - 1) // SIZE - begin // SIZE).to(tl.int32)
        for i in range(number + 1, until + 1, BLOCK):
            j = i + tl.arange(0, BLOCK)
            at = tl.load(parts + j, mask=j <= until, other=0)
            more_param += tl.sum(tl.load(param_sums + at, mask=j <= until, other=0.0), axis=0)
            more_grad += tl.sum(tl.load(grad_sums + at, mask=j <= until, other=0.0), axis=0)
        coefs = tl.load(row + ROW_COEFS).to(tl.pointer_type(C)) + first
        part = tl.load(parts + number)
        for i in range(low, high, BLOCK):
            r = i + tl.arange(0, BLOCK)
            mask = r < high
            param = tl.load(param_sums + part + r, mask=mask, other=0.0)
            grad = tl.load(grad_sums + part + r, mask=mask, other=0.0)
            param = tl.where(r == high - 1, param + more_param, param)
            grad = tl.where(r == high - 1, grad + more_grad, grad)
            coef = agc_coefficient(group, tl.sqrt(param), tl.sqrt(grad) * unscale)
            factor = coef * unscale
            tl.store(coefs + r, factor.to(C), mask=mask)
            total += tl.where(mask, factor * factor * grad, 0.0)
            least = tl.where(mask, smaller(coef, least), least)
    spoiled = tl.max((least != least).to(tl.int32), axis=0)
    lowest = tl.min(tl.where(least == least, least, 1.0), axis=0)
    tl.store(smallest + number, tl.where(spoiled != 0, float("nan"), lowest))
    tl.store(squares + number, tl.sum(total, axis=0))
