"""select: a sample, and the filter that it suggests for each unit: the first part of a selection.

See select.py, which goes on from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .how import How  # noqa: F401 - what HOW is
from .operands import OWN, row_of, take, tensor_of
from .ops import magnitude
from .source import begun
from .table import (
    GROUP_WORDS,
    ROW_GROUP,
    ROW_NUMEL,
    ROW_WORDS,
    UNIT_FILTER,
    UNIT_FOUND,
    UNIT_K,
    UNIT_KEY,
    UNIT_LEFT,
    UNIT_SETTLED,
    UNIT_WORDS,
)

DIGIT_BITS = 11
DIGITS = tl.constexpr(1 << DIGIT_BITS)
LINE = tl.constexpr(16)  # elements of a sampled line
SAMPLE = tl.constexpr(8192)  # elements of a sample, at most


@triton.jit
def chosen_of(elements, spec):
    """How many of so many elements are chosen; spec: a ratio or, if that is 0, k."""
    ratio = tl.load(spec)
    wanted = tl.ceil(ratio * elements.to(tl.float64))
    wanted = tl.where(ratio > 0, wanted, tl.load(spec + 1)).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), elements)


@triton.jit
def selecting(tensors, gradients, hypers, go, t, FREEZES: tl.constexpr):
    """Whether a tensor takes part in the selection: in the step, and not with an lr of 0."""
    active = (tl.load(gradients + t) != 0) & (tl.load(go) != 0)
    if FREEZES:
        group = tl.load(tensors + t.to(tl.int64) * ROW_WORDS + ROW_GROUP)
        active = active & (tl.load(hypers + group * GROUP_WORDS) != 0)
    return active


@triton.jit
def kth_largest(keys, k, WIDE: tl.constexpr):
    """The k-th largest of a block of keys, of which those that do not count are negative."""
    key = keys.to(tl.int64)
    found = tl.full((), 0, tl.int64)
    for i in range(63 if WIDE else 31):
        trial = found | (tl.full((), 1, tl.int64) << ((62 if WIDE else 30) - i))
        reach = tl.sum((key >= trial).to(tl.int32), axis=0)
        found = tl.where(reach >= k, trial, found)
    return found


@triton.jit
def sample(
    tensors,
    gradients,
    layouts,
    item_tensor,
    item_line,
    item_count,
    places,
    numbers,
    keys,
    go,
    samples,
    LINES: tl.constexpr,
    HOW: tl.constexpr,
):
    """Evaluates a few lines of one tensor. Keys of what is not there are -1."""
    c = tl.program_id(0)
    t = tl.load(item_tensor + c)
    j = tl.arange(0, LINES * LINE)
    line = tl.load(item_line + c) + j // LINE
    mine = j // LINE < tl.load(item_count + c)
    key = tl.full([LINES * LINE], -1, tl.int64)
    if (tl.load(gradients + t) != 0) & (tl.load(go) != 0):
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        o = tl.load(places + line, mask=mine, other=0) + j % LINE
        there = mine & (o < numel)
        _, p, g, s = take(tensor, o, there, HOW)
        if HOW.absorbed:
            value = HOW.again(g, s)
        else:
            value, _, _ = HOW.rule(p, g, begun(s, g, tensor[2][2], HOW), tensor[2][OWN:])
        key = tl.where(there, magnitude(value, HOW.wide).to(tl.int64), -1)
    tl.store(samples + line.to(tl.int64) * LINE + j % LINE, key, mask=mine)


@triton.jit(do_not_specialize=["count"])
def begin_select(
    tensors,
    gradients,
    hypers,
    member,
    lines,
    spec,
    go,
    samples,
    units,
    histogram,
    count,
    GLOBAL: tl.constexpr,
    FREEZES: tl.constexpr,
    WIDE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One unit: how many are wanted, and which filter the sample suggests."""
    i = tl.program_id(0)
    u = tl.load(member + i)
    elements = tl.full((), 0, tl.int64)
    if GLOBAL:
        for first in range(0, count, SPAN):
            t = first + tl.arange(0, SPAN)
            there = t < count
            t = tl.where(there, t, 0)
            mine = there & selecting(tensors, gradients, hypers, go, t, FREEZES)
            numel = tl.load(tensors + t.to(tl.int64) * ROW_WORDS + ROW_NUMEL)
            elements += tl.sum(tl.where(mine, numel, 0), axis=0)
    else:
        _, numel = row_of(tensors, u)
        elements = tl.where(selecting(tensors, gradients, hypers, go, u, FREEZES), numel, 0)
    k = chosen_of(elements, spec)
    least = tl.full((), 1, tl.int64)  # all but zeros
    first = tl.load(lines + i).to(tl.int64) * LINE
    o = first + tl.arange(0, SAMPLE)
    seen = tl.load(samples + o, mask=o < tl.load(lines + i + 1) * LINE, other=-1)
    size = tl.sum((seen >= 0).to(tl.int32), axis=0)
    if (k > 0) & (size > 0):
        expected = k.to(tl.float64) / elements.to(tl.float64) * size.to(tl.float64)
        rank = (expected + 5.0 * tl.sqrt(expected) + 8.0).to(tl.int32)
        if rank < size:
            least = tl.maximum(least, kth_largest(seen, rank + 1, WIDE))
    if k == 0:
        least = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    unit = units + u * UNIT_WORDS
    tl.store(unit + UNIT_K, k)
    tl.store(unit + UNIT_FILTER, least)
    tl.store(unit + UNIT_FOUND, 0)
    tl.store(unit + UNIT_KEY, 0)
    tl.store(unit + UNIT_LEFT, k)
    tl.store(unit + UNIT_SETTLED, 0)
    d = tl.arange(0, DIGITS)
    tl.store(histogram + u.to(tl.int64) * DIGITS + d, tl.zeros([DIGITS], tl.int64))
