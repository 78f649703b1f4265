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
from .operands import OWN, row_of, take, tensor_of, write
from .ops import magnitude, mix32, philox, word
from .source import begun
from .table import (
    GROUP_WORDS,
    KEY_STEP,
    LIST,
    ROW_CHUNKS,
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


# ---- what is wanted ------------------------------------------------------------------------------


@triton.jit
def chosen_of(elements, spec):
    """How many of so many elements are chosen; spec: a ratio or, if that is 0, k."""
    ratio = tl.load(spec)
    wanted = tl.ceil(ratio * elements.to(tl.float64))
    wanted = tl.where(ratio > 0, wanted, tl.load(spec + 1)).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), elements)


@triton.jit
def selecting(tensors, gradients, hypers, t, FREEZES: tl.constexpr):
    """Whether a tensor takes part in the selection: in the step, and not with an lr of 0."""
    active = tl.load(gradients + t) != 0
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
            mine = there & selecting(tensors, gradients, hypers, t, FREEZES)
            numel = tl.load(tensors + t.to(tl.int64) * ROW_WORDS + ROW_NUMEL)
            elements += tl.sum(tl.where(mine, numel, 0), axis=0)
    else:
        _, numel = row_of(tensors, u)
        elements = tl.where(selecting(tensors, gradients, hypers, u, FREEZES), numel, 0)
    k = chosen_of(elements, spec)
    k = tl.where(tl.load(go) != 0, k, 0)
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
def look(
    BODY: tl.constexpr, tensor, more, unit, lists, number, index, numel, carry, HOW: tl.constexpr
):
    """Takes what is in question of a chunk through body(tensor, more, o, mask, key, carry, HOW)."""
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
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    u = t * 0 if GLOBAL else t
    unit = units + u * UNIT_WORDS
    mine = selecting(tensors, gradients, hypers, t, FREEZES) & (tl.load(go) != 0)
    if mine & in_question(unit):
        number = tl.load(chunk_number + c).to(tl.int64)
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        lists = (counts, list_keys, list_places)
        more = (tl.load(unit + UNIT_KEY), shift, width)
        found = tl.zeros([DIGITS], tl.int32)
        index = tl.load(chunk_index + c)
        found = look(digit, tensor, more, unit, lists, number, index, numel, found, HOW)
        d = tl.arange(0, DIGITS)
        row = histogram + u.to(tl.int64) * DIGITS
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
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    number = tl.load(chunk_number + c).to(tl.int64)
    unit = units + (t * 0 if GLOBAL else t) * UNIT_WORDS
    mine = selecting(tensors, gradients, hypers, t, FREEZES) & (tl.load(go) != 0)
    have = tl.full((), 0, tl.int32)
    if mine & in_question(unit):
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        lists = (counts, list_keys, list_places)
        index = tl.load(chunk_index + c)
        key = tl.load(unit + UNIT_KEY)
        have = look(count_ties, tensor, key, unit, lists, number, index, numel, have, HOW)
    tl.store(equals + number, have)


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
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    unit = units + (t * 0 if GLOBAL else t) * UNIT_WORDS
    mine = selecting(tensors, gradients, hypers, t, FREEZES) & (tl.load(go) != 0)
    if mine & (tl.load(unit + UNIT_K) > 0):
        number = tl.load(chunk_number + c).to(tl.int64)
        index = tl.load(chunk_index + c)
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        left = tl.load(unit + UNIT_LEFT)
        before = tl.full((), 0, tl.int64)
        if tl.load(unit + UNIT_SETTLED) != 0:
            left = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)  # all of them
        else:
            first = 0 if GLOBAL else number - index
            for i in range(first, number, SPAN):
                j = i + tl.arange(0, SPAN)
                before += tl.sum(tl.load(equals + j, mask=j < number, other=0), axis=0)
        lists = (counts, list_keys, list_places)
        more = (tl.load(unit + UNIT_KEY), left)
        look(accept_large, tensor, more, unit, lists, number, index, numel, before, HOW)


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
    if selecting(tensors, gradients, hypers, t, FREEZES) & (tl.load(go) != 0):
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


# ---- rand-k --------------------------------------------------------------------------------------


@triton.jit
def mixed(index, half, low, keys):
    """Six rounds of a Feistel network."""
    left = word(index >> half.to(tl.uint64)) & low
    right = word(index) & low
    for i in tl.static_range(6):
        after = left ^ (mix32(right ^ keys[i]) & low)
        left = right
        right = after
    return (left.to(tl.uint64) << half.to(tl.uint64)) | right.to(tl.uint64)


@triton.jit
def permuted(j, size, seed_low, seed_high, step, t):
    """A permutation of [0, size), drawn by seed, step and tensor. Twin of csrc/core/random.h."""
    b = tl.arange(0, 64).to(tl.int64)
    smaller = (b < 62) & ((tl.full([64], 1, tl.int64) << tl.minimum(b, 62)) < size)
    half = (tl.maximum(tl.sum(smaller.to(tl.int32), axis=0), 1) + 1) // 2
    low = word((tl.full((), 1, tl.int64) << half.to(tl.int64)) - 1)
    zero = step * 0
    a = philox(zero, zero, step, word(t), seed_low ^ 0x9E3779B9, seed_high)
    b = philox(zero + 1, zero, step, word(t), seed_low ^ 0x9E3779B9, seed_high)
    index = mixed(j.to(tl.uint64), half, low, a + b)
    outside = index.to(tl.int64) >= size
    while tl.max(outside.to(tl.int32), axis=0) != 0:
        index = tl.where(outside, mixed(index, half, low, a + b), index)
        outside = index.to(tl.int64) >= size
    return index.to(tl.int64)


@triton.jit
def rand_k(
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
    seeds,
    HOW: tl.constexpr,
    FREEZES: tl.constexpr,
):
    """A share of the first k of a permutation of a tensor's elements is taken in."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    if selecting(tensors, gradients, hypers, t, FREEZES) & (tl.load(go) != 0):
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        k = chosen_of(numel, spec)
        shares = tl.load(tensors + t.to(tl.int64) * ROW_WORDS + ROW_CHUNKS)
        share = tl.load(chunk_index + c).to(tl.int64)
        end = k * (share + 1) // shares
        scale = tl.full((), 1.0, tl.float64)
        if tl.load(spec + 2) != 0:
            scale = numel.to(tl.float64) / k.to(tl.float64)
        step = tensor[3][KEY_STEP]
        for first in range(k * share // shares, end, HOW.block):
            j = first + tl.arange(0, HOW.block)
            mask = j < end
            # Those past the end might be walked for ever.
            j = tl.where(mask, j, 0)
            o = permuted(j, numel, tl.load(seeds), tl.load(seeds + 1), step, t)
            accept(tensor, o, mask, scale.to(HOW.compute), HOW)
