"""select: which coordinates of a unit (a tensor, all tensors, a block) are the k largest.

Exact; of equals the first ones; the CPU backend's choice (csrc/cpu/select.h). A sample of the
values suggests a filter that a little more than k of them reach, and the pass that evaluates them
keeps these in a list per chunk, in order. A radix selection then finds the k-th magnitude: over the
lists or, where the filter was misled, over all values; where one list was too short, over the
values of its chunk. All of that is a number of launches that never changes: they find out on the
device what they look at. Counts are integers, so their order does not matter.

Blocks, and tensors of one chunk, are selected from by one program each, in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .how import How  # noqa: F401 - what HOW is
from .operands import OWN, take, tensor_of, write
from .ops import magnitude
from .sample import DIGITS, chosen_of, kth_largest, selecting
from .table import (
    LIST,
    UNIT_FILTER,
    UNIT_FOUND,
    UNIT_K,
    UNIT_KEY,
    UNIT_LEFT,
    UNIT_SETTLED,
    UNIT_WORDS,
)

# ---- looking at candidates, or at values ---------------------------------------------------------


@triton.jit
def trusted(unit):
    """Whether the candidates hold the k largest."""
    found = tl.load(unit + UNIT_FOUND)
    return (found >= tl.load(unit + UNIT_K)) | (tl.load(unit + UNIT_FILTER) == 1)


@triton.jit
def in_question(unit):
    """Whether there is something to choose, and not every candidate is chosen."""
    k = tl.load(unit + UNIT_K)
    all_ = trusted(unit) & (tl.load(unit + UNIT_FOUND) <= k)
    return (k > 0) & (tl.load(unit + UNIT_SETTLED) == 0) & (all_ == 0)


@triton.jit
def unit_of(units, t, GLOBAL: tl.constexpr):
    """The unit that a tensor is in."""
    return units + (t * 0 if GLOBAL else t) * UNIT_WORDS


@triton.jit
def look(BODY: tl.constexpr, chunk, more, unit, lists, carry, HOW: tl.constexpr):
    """Takes what is in question of a chunk through body(tensor, more, o, mask, key, carry, HOW)."""
    tensor, numel, number, index = chunk
    counts, keys, places = lists
    begin = index.to(tl.int64) * HOW.chunk
    found = tl.load(counts + number)
    if trusted(unit) & (found <= LIST):
        for j in range(0, found, HOW.block):
            i = j + tl.arange(0, HOW.block)
            mask = i < found
            key = tl.load(keys + number * LIST + i, mask=mask, other=0)
            o = begin + tl.load(places + number * LIST + i, mask=mask, other=0)
            carry = BODY(tensor, more, o, mask, key, carry, HOW)
    else:
        end = tl.minimum(begin + HOW.chunk, numel)
        for j in range(0, (end - begin).to(tl.int32), HOW.block):
            o = begin + j + tl.arange(0, HOW.block)
            mask = o < end
            _, _, g, s = take(tensor, o, mask, HOW)
            key = magnitude(HOW.again(g, s), HOW.wide)
            carry = BODY(tensor, more, o, mask, key, carry, HOW)
    return carry


@triton.jit
def chunk_of(tables, t, chunk_number, chunk_index, HOW: tl.constexpr):
    """A chunk as look() takes it: its tensor, the elements of that, its two numbers."""
    c = tl.program_id(0)
    tensors, gradients, layouts, numbers, keys = tables
    tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
    return tensor, numel, tl.load(chunk_number + c).to(tl.int64), tl.load(chunk_index + c)


@triton.jit
def digit(tensor, more, o, mask, key, carry, HOW: tl.constexpr):
    """Counts one digit of those that have the digits before it."""
    prefix, shift, width = more
    key = key.to(tl.int64)
    same = mask & ((key >> (shift + width)) == (prefix >> (shift + width)))
    place = ((key >> shift) & ((1 << width) - 1)).to(tl.int32)
    return carry + tl.histogram(tl.where(same, place, 0), DIGITS, mask=same)


@triton.jit(do_not_specialize=["shift", "width"])
def narrow(
    tensors,
    gradients,
    layouts,
    hypers,
    chunk_tensor,
    chunk_index,
    chunk_number,
    numbers,
    keys,
    go,
    units,
    counts,
    list_keys,
    list_places,
    histogram,
    shift,
    width,
    HOW: tl.constexpr,
    GLOBAL: tl.constexpr,
    FREEZES: tl.constexpr,
):
    """One digit, of one chunk."""
    t = tl.load(chunk_tensor + tl.program_id(0))
    unit = unit_of(units, t, GLOBAL)
    if selecting(tensors, gradients, hypers, go, t, FREEZES) & in_question(unit):
        tables = (tensors, gradients, layouts, numbers, keys)
        chunk = chunk_of(tables, t, chunk_number, chunk_index, HOW)
        lists = (counts, list_keys, list_places)
        more = (tl.load(unit + UNIT_KEY), shift, width)
        found = look(digit, chunk, more, unit, lists, tl.zeros([DIGITS], tl.int32), HOW)
        d = tl.arange(0, DIGITS)
        row = histogram + (t * 0 if GLOBAL else t).to(tl.int64) * DIGITS
        tl.atomic_add(row + d, found.to(tl.int64), mask=found > 0)


@triton.jit(do_not_specialize=["shift"])
def settle(member, units, histogram, tallies, go, shift):
    """One unit: which digit the k-th magnitude has."""
    u = tl.load(member + tl.program_id(0))
    unit = units + u * UNIT_WORDS
    k = tl.load(unit + UNIT_K)
    if (tl.load(go) != 0) & (k > 0) & (tl.load(unit + UNIT_SETTLED) == 0):
        if in_question(unit):
            d = tl.arange(0, DIGITS)
            row = histogram + u.to(tl.int64) * DIGITS
            have = tl.load(row + d)
            left = tl.load(unit + UNIT_LEFT)
            at_least = tl.sum(have, axis=0) - tl.cumsum(have, axis=0) + have
            pick = tl.sum((at_least >= left).to(tl.int32), axis=0) - 1
            here = tl.sum(tl.where(d == pick, have, 0), axis=0)
            left -= tl.sum(tl.where(d == pick, at_least - have, 0), axis=0)
            key = tl.load(unit + UNIT_KEY) | (pick.to(tl.int64) << shift)
            tl.store(row + d, tl.zeros([DIGITS], tl.int64))
            tl.store(unit + UNIT_KEY, key)
            tl.store(unit + UNIT_LEFT, left)
            if shift == 0:
                tl.store(unit + UNIT_SETTLED, (here == left).to(tl.int64))
                tl.atomic_add(tallies, 1)
                tl.atomic_add(tallies + 1, (trusted(unit) == 0).to(tl.int64))
        else:
            tl.store(unit + UNIT_KEY, tl.load(unit + UNIT_FILTER))
            tl.store(unit + UNIT_SETTLED, 1)
            tl.atomic_add(tallies, 1)


# ---- who is chosen -------------------------------------------------------------------------------


@triton.jit
def count_ties(tensor, more, o, mask, key, carry, HOW: tl.constexpr):
    """How many have the k-th magnitude."""
    return carry + tl.sum((mask & (key == more)).to(tl.int32), axis=0)


@triton.jit
def ties(
    tensors,
    gradients,
    layouts,
    hypers,
    chunk_tensor,
    chunk_index,
    chunk_number,
    numbers,
    keys,
    go,
    units,
    counts,
    list_keys,
    list_places,
    equals,
    HOW: tl.constexpr,
    GLOBAL: tl.constexpr,
    FREEZES: tl.constexpr,
):
    """Where not all of equal magnitude are chosen: how many a chunk has."""
    t = tl.load(chunk_tensor + tl.program_id(0))
    unit = unit_of(units, t, GLOBAL)
    have = tl.full((), 0, tl.int32)
    if selecting(tensors, gradients, hypers, go, t, FREEZES) & in_question(unit):
        tables = (tensors, gradients, layouts, numbers, keys)
        chunk = chunk_of(tables, t, chunk_number, chunk_index, HOW)
        lists = (counts, list_keys, list_places)
        have = look(count_ties, chunk, tl.load(unit + UNIT_KEY), unit, lists, have, HOW)
    tl.store(equals + tl.load(chunk_number + tl.program_id(0)), have)


@triton.jit
def accept(tensor, o, chosen, scale, HOW: tl.constexpr):
    """Chosen coordinates are taken in."""
    where, p, g, s = take(tensor, o, chosen, HOW)
    p, s = HOW.rule(p, s, HOW.again(g, s) * scale, tensor[2][OWN:])
    write(tensor[0], where, chosen, (p, g) + s, o, tensor[3], HOW.writes, HOW)


@triton.jit
def accept_large(tensor, more, o, mask, key, carry, HOW: tl.constexpr):
    """Those of the k-th magnitude up to their number, and all larger ones. Zeros never."""
    last, left = more
    equal = (mask & (key == last)).to(tl.int32)
    rank = carry + tl.cumsum(equal, axis=0)
    chosen = (key > last) | ((equal != 0) & (rank <= left))
    accept(tensor, o, mask & chosen & (key != 0), 1.0, HOW)
    return carry + tl.sum(equal, axis=0)


@triton.jit
def selected(
    tensors,
    gradients,
    layouts,
    hypers,
    chunk_tensor,
    chunk_index,
    chunk_number,
    numbers,
    keys,
    go,
    units,
    counts,
    list_keys,
    list_places,
    equals,
    HOW: tl.constexpr,
    GLOBAL: tl.constexpr,
    FREEZES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """What is chosen of one chunk is taken in."""
    t = tl.load(chunk_tensor + tl.program_id(0))
    unit = unit_of(units, t, GLOBAL)
    if selecting(tensors, gradients, hypers, go, t, FREEZES) & (tl.load(unit + UNIT_K) > 0):
        tables = (tensors, gradients, layouts, numbers, keys)
        chunk = chunk_of(tables, t, chunk_number, chunk_index, HOW)
        number = chunk[2]
        left = tl.load(unit + UNIT_LEFT)
        before = tl.full((), 0, tl.int64)
        if tl.load(unit + UNIT_SETTLED) != 0:
            left = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)  # all of them
        else:
            first = 0 if GLOBAL else number - chunk[3]
            for i in range(first, number, SPAN):
                j = i + tl.arange(0, SPAN)
                before += tl.sum(tl.load(equals + j, mask=j < number, other=0), axis=0)
        lists = (counts, list_keys, list_places)
        more = (tl.load(unit + UNIT_KEY), left)
        look(accept_large, chunk, more, unit, lists, before, HOW)


@triton.jit
def select_block(
    tensors,
    gradients,
    layouts,
    hypers,
    chunk_tensor,
    chunk_index,
    numbers,
    keys,
    go,
    spec,
    LOOKS: tl.constexpr,
    HOW: tl.constexpr,
    FREEZES: tl.constexpr,
):
    """The k largest of one block of consecutive elements."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    if selecting(tensors, gradients, hypers, go, t, FREEZES):
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, LOOKS)
        begin = tl.load(chunk_index + c).to(tl.int64) * HOW.block
        o = begin + tl.arange(0, HOW.block)
        mask = o < numel
        _, _, g, s = take(tensor, o, mask, LOOKS)
        key = tl.where(mask, magnitude(LOOKS.again(g, s), HOW.wide), -1)
        k = chosen_of(tl.minimum(numel - begin, HOW.block), spec)
        last = kth_largest(key, k, HOW.wide)
        left = k - tl.sum((key > last).to(tl.int32), axis=0)
        mine, _ = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        accept_large(mine, (last, left), o, mask, key, tl.full((), 0, tl.int64), HOW)
