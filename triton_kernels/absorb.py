"""absorb: a gradient goes into its states as soon as backward has made it, and is not kept.

Per gradient: look (where the policy refuses what is not finite), admit, and the rule's first pass.
What differs from gradient to gradient comes by value: nothing has to be sent, and a captured graph
has it of its own. Who has taken something in since the last step is counted on the device, because
replays change that, and the host sees none of them. The step after that finds the gradients in the
states; `begin_absorbed` tells it whose.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finalize import keep_constants, number_at
from .fold import any_flag
from .operands import pointer, row_of
from .ops import noise_key
from .reduce import MAX, SPOILED, walk
from .rule import KNOWN
from .table import (
    KEY_NOISE,
    KEY_WORDS,
    ROW_CHUNKS,
    ROW_FIRST,
    ROW_GRAD_LAYOUT,
    ROW_SCALE,
    ROW_STEPS,
)

DOOR = tl.constexpr(4)  # 32-bit words that a tensor has for whether its gradient is taken in
WORDS = 8  # hyper-parameters at most, of a rule that absorbs
VALUES = ("place", "address", "rated", "sign", "once", *(f"h{i}" for i in range(WORDS)))


@triton.jit(do_not_specialize=["address"])
def look(
    tensors,
    layouts,
    chunk_tensor,
    chunk_index,
    chunk_number,
    flags,
    address: tl.int64,
    T: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Flags a chunk of the gradient that holds what is not finite."""
    c = tl.program_id(0)
    row, numel = row_of(tensors, tl.load(chunk_tensor + c))
    begin = tl.load(chunk_index + c).to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, numel)
    layout = layouts + tl.load(row + ROW_GRAD_LAYOUT)
    at = pointer(address, T, ALIGNED)
    if ALIGNED:
        body = tl.minimum(begin + CHUNK, numel // 16 * 16)
        _, bad = walk(at, begin, body, layout, MAX, 0.0, C, DIMS, BLOCK)
        _, worse = walk(at, body, end, layout, MAX, 0.0, C, DIMS, 16)
        bad = bad | worse
    else:
        _, bad = walk(at, begin, end, layout, MAX, 0.0, C, DIMS, BLOCK)
    tl.store(flags + tl.load(chunk_number + c), bad)


@triton.jit(do_not_specialize=VALUES)
def admit(
    tensors,
    gradients,
    flags,
    rates,
    taken,
    counters,
    spoiled,
    numbers,
    keys,
    doors,
    place: tl.int64,
    address: tl.int64,
    rated: tl.int64,
    sign: tl.int64,
    once: tl.int64,
    h0: tl.int64,
    h1: tl.int64,
    h2: tl.int64,
    h3: tl.int64,
    h4: tl.int64,
    h5: tl.int64,
    h6: tl.int64,
    h7: tl.int64,
    PREPARE: tl.constexpr,
    HYPER: tl.constexpr,
    NUMBERS: tl.constexpr,
    ASKS: tl.constexpr,
    NAMES: tl.constexpr,
    NOISY: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Whether the gradient is taken in, and the constants of the pass that does it.

    `h0` and so on are hyper-parameters, as the bits of float64; those that `once` has a bit for are
    0 for all gradients of a step but the first. `rated`: the first one, lr, is in `rates`.
    """
    t = place.to(tl.int32) + tl.arange(0, 1)
    mask = t == t
    row, _ = row_of(tensors, place)
    enters = tl.full((), 1, tl.int32)
    if ASKS:
        first = tl.load(row + ROW_FIRST)
        bad = any_flag(flags, first, first + tl.load(row + ROW_CHUNKS), SPOILED, SPAN)
        if bad != 0:
            tl.atomic_add(counters, tl.full((), 1, tl.int64))  # streams may do so at once
            if NAMES:
                tl.store(spoiled + place, 1)
        enters = (bad == 0).to(tl.int32)
    before = tl.load(taken + place)
    words = (h0, h1, h2, h3, h4, h5, h6, h7)
    h = ()
    for i in tl.static_range(HYPER):
        value = words[i].to(tl.int64).to(tl.float64, bitcast=True)
        if i == 0:
            value = tl.where(rated != 0, tl.load(rates + place), value)
        h = h + (tl.where((before != 0) & (((once >> i) & 1) != 0), 0.0, value),)
    none = tl.zeros([1], tl.float64)
    _, _, steps = number_at(tl.load(row + ROW_STEPS) + tl.zeros([1], tl.int64), mask, tl.float32)
    scale_at, held, scale = number_at(
        tl.load(row + ROW_SCALE) + tl.zeros([1], tl.int64), mask, tl.float64
    )
    coef = none + sign.to(tl.float64)
    x = (none, steps + 1.0, coef, none, none, scale, none + 1.0)
    x = x + (none, none, none, none, none)
    tl.static_assert(len(x) == KNOWN)
    keep_constants(numbers, t, mask, x, coef, none - 1.0, h, PREPARE, NUMBERS)
    if NOISY:
        key = noise_key(steps.to(tl.int64), t.to(tl.int64))
        tl.store(keys + t * KEY_WORDS + KEY_NOISE, key[0])
        tl.store(keys + t * KEY_WORDS + KEY_NOISE + 1, key[1])
    tl.store(gradients + place, address)
    tl.store(doors + place * DOOR, enters)
    tl.store(taken + place, before + enters)
    # What was sent in the last step is taken off by this pass, and by no other.
    tl.store(scale_at, none, mask=held & (t * 0 + enters != 0))


@triton.jit(do_not_specialize=["count"])
def begin_absorbed(taken, gradients, count, SPAN: tl.constexpr):
    """The tensors that have taken something in take part in the step, and begin anew."""
    t = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    found = tl.load(taken + t, mask=t < count, other=0)
    tl.store(gradients + t, found, mask=t < count)
    tl.store(taken + t, found * 0, mask=t < count)
