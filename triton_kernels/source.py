"""source: the passes of a rule before apply.

A pass keeps what it changes, and sums its values up or keeps the large ones as candidates of a
selection.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .draw import MARKS, drawn
from .how import How  # noqa: F401 - what HOW is
from .operands import by_chance, constants_at, sweep, take, tensor_of, write
from .ops import magnitude, widen
from .table import LIST, UNIT_FILTER, UNIT_FOUND, UNIT_WORDS


@triton.jit
def begun(s, g, first, HOW: tl.constexpr):
    """States; in a tensor's first step some are the gradient."""
    COUNT: tl.constexpr = HOW.states
    out = ()
    for k in tl.static_range(COUNT):
        if (HOW.starts >> k) & 1:
            out = out + (tl.where(first != 0, g, s[k]),)
        else:
            out = out + (s[k],)
    return out


@triton.jit
def collect(list_, value, o, mask, count, HOW: tl.constexpr):
    """Keeps those that reach the filter, in order; returns how many there were up to here."""
    least, keys, places, begin = list_
    key = magnitude(value, HOW.wide)
    reaches = (mask & (key >= least)).to(tl.int32)
    place = count + tl.cumsum(reaches, axis=0) - reaches
    kept = (reaches != 0) & (place < LIST)
    tl.store(keys + place, key, mask=kept)
    tl.store(places + place, (o - begin).to(tl.int32), mask=kept)
    return count + tl.sum(reaches, axis=0)


@triton.jit
def evaluate(tensor, list_, first, o, limit, sums, count, HOW: tl.constexpr):
    """Elements `o`, as far as they are below `limit`."""
    at, key, starting = tensor[0], tensor[3], tensor[2][2]
    mask = o < limit
    where, p, g, s = take(tensor, o, mask, HOW)
    s = begun(s, g, starting, HOW)
    h = constants_at(tensor, o, mask, HOW)
    if HOW.absorbed:
        value = HOW.again(g, s)
    elif HOW.draws == MARKS:
        OWNED: tl.constexpr = HOW.states - 1
        marks = s[OWNED]
        value, p, s = HOW.rule(p, g, s[:OWNED], h, marks)
        s = s + (marks,)
    elif HOW.draws:
        value, p, s = HOW.rule(p, g, s, h, drawn(first, key, o.shape[0], HOW))
    else:
        value, p, s = HOW.rule(p, g, s, h)
    if HOW.keeps:
        if (HOW.noisy >> 2) & 1:
            # What is summed up or selected is what is stored. Rounding it again changes nothing.
            value = widen(by_chance(value, o, key, 2, HOW), HOW.compute)
            s = (value,) + s[1:]
    write(at, where, mask, (p, g) + s, o, key, HOW.writes, HOW)
    if (HOW.starts << 2) & ~HOW.writes:
        if starting != 0:  # once: later steps save the stream
            write(at, where, mask, (p, g) + s, o, key, (HOW.starts << 2) & ~HOW.writes, HOW)
    if HOW.collects:
        count = collect(list_, value, o, mask, count, HOW)
    # In float64: what was read has been written over, so there is no second look at a sum.
    if HOW.sum == 1:
        sums += tl.where(mask, tl.abs(value.to(tl.float64)), 0.0)
    elif HOW.sum == 2:
        value = value.to(tl.float64)
        sums += tl.where(mask, value * value, 0.0)
    return sums, count


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
    units,
    counts,
    list_keys,
    list_places,
    HOW: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    """Passes over one chunk; leaves its sum, and how many elements went into it.

    Where it collects, it leaves candidates and how many there are (select.py).
    """
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    number = tl.load(chunk_number + c).to(tl.int64)
    length = tl.full((), 0.0, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    found = tl.full((), 0, tl.int32)
    if (tl.load(gradients + t) != 0) & (tl.load(go) != 0):
        index = tl.load(chunk_index + c)
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        unit = units + (0 if GLOBAL else t) * UNIT_WORDS
        begin = index.to(tl.int64) * HOW.chunk
        list_ = ()
        if HOW.collects:
            least = tl.load(unit + UNIT_FILTER)
            list_ = (least, list_keys + number * LIST, list_places + number * LIST, begin)
        total, found = sweep(evaluate, tensor, list_, index, numel, HOW)
        length = tl.minimum(HOW.chunk, numel - begin).to(tl.float64)
        if HOW.collects:
            tl.atomic_add(unit + UNIT_FOUND, found.to(tl.int64))
    if HOW.sum != 0:
        tl.store(sums + number, total)
        tl.store(lengths + number, length)
    if HOW.collects:
        tl.store(counts + number, found)
