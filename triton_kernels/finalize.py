"""finalize: partial sums become norms, clip coefficients, the constants of every tensor's update.

A program takes a few tensors. What a whole scope unit needs, every program adds up for itself, all
in the same order: that is cheaper than another launch, and the same to the bit. Everything stays on
the device: whether the step happens is a number that the later kernels read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fold import any_flag, any_flag_rows, fold, fold_rows, least_rows
from .operands import CONSTANTS, OWN
from .ops import noise_key
from .reduce import POWER, PRESENT, SPOILED, SQUARES
from .rule import COEF, FIRST, KNOWN, STAGE
from .table import (
    GROUP_COUNTS,
    GROUP_EPS,
    GROUP_L0,
    GROUP_L1,
    GROUP_MAX_NORM,
    GROUP_MODE,
    GROUP_SIGN,
    GROUP_VALUE,
    GROUP_WORDS,
    KEY_NOISE,
    KEY_SEED,
    KEY_STEP,
    KEY_WORDS,
    ROW_CHUNKS,
    ROW_COUNTED,
    ROW_FIRST,
    ROW_GROUP,
    ROW_NORM,
    ROW_NUMEL,
    ROW_PICKED,
    ROW_SCALE,
    ROW_STEPS,
    ROW_WORDS,
)

# Over what a sum is taken. Values as in csrc/cpu/run.h.
GLOBAL = tl.constexpr(0)
GROUP = tl.constexpr(1)
TENSOR = tl.constexpr(2)

# A group's mode, where its clip has a coefficient per row (rows.py). As in csrc/core/math/clip.h.
MODE_ROWS = tl.constexpr(5.0)


@triton.jit
def takes_part(row, gradients, t):
    """Whether tensors have a gradient; an empty part of a larger one has none to point at."""
    return (tl.load(gradients + t) != 0) | (tl.load(row + ROW_COUNTED) != 0)


@triton.jit
def norm_of(total, unscale, KIND: tl.constexpr, P: tl.constexpr):
    """A norm from its sum, in the units of unscaled gradients."""
    if KIND == SQUARES:
        total = tl.sqrt(total)
    if KIND == POWER:
        total = tl.where(total == 0, 0.0, tl.exp2(tl.log2(total) / P))
    return total * unscale


@triton.jit
def loss_scale(amp):
    """What undoes the loss scale, and its overflow flag; 1 and 0 where there are none."""
    unscale = tl.full((), 1.0, tl.float64)
    overflow = tl.full((), 0.0, tl.float32)
    scale_at = tl.load(amp)
    overflow_at = tl.load(amp + 1)
    if scale_at != 0:
        scale = tl.load(scale_at.to(tl.pointer_type(tl.float32)))
        unscale = (1.0 / scale.to(tl.float64)).to(tl.float32).to(tl.float64)
    if overflow_at != 0:
        overflow = tl.load(overflow_at.to(tl.pointer_type(tl.float32)))
    return unscale, overflow


@triton.jit
def clip_coefficient(group, norm):
    """What a gradient of this norm is multiplied by. Twin of csrc/core/math/clip.h.

    A NaN norm gives a NaN coefficient.
    """
    mode = tl.load(group + GROUP_MODE)
    max_norm = tl.load(group + GROUP_MAX_NORM)
    eps = tl.load(group + GROUP_EPS)
    ratio = max_norm / (norm + eps)
    curvature = tl.load(group + GROUP_L0) + tl.load(group + GROUP_L1) * norm
    hard = tl.where(ratio > 1.0, 1.0, ratio)
    smooth = 1.0 / (1.0 + norm / max_norm)
    normalize = tl.where(norm == 0, 0.0, ratio)
    smoothness = tl.where(curvature == 0, 0.0, 1.0 / curvature)
    coef = tl.where(mode == 1.0, hard, 1.0)
    coef = tl.where(mode == 2.0, smooth, coef)
    coef = tl.where(mode == 3.0, normalize, coef)
    return tl.where(mode == 4.0, smoothness, coef)


@triton.jit
def gather(base, offsets, COUNT: tl.constexpr):
    """COUNT numbers that follow each offset."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(base + offsets + i),)
    return out


@triton.jit
def number_at(addresses, mask, T: tl.constexpr):
    """The numbers at these addresses, as float64; 0 where there are none."""
    held = mask & (addresses != 0)
    at = addresses.to(tl.pointer_type(T))
    return at, held, tl.load(at, mask=held, other=0.0).to(tl.float64)


@triton.jit
def keep_constants(numbers, t, mask, x, coef, bound, h, PREPARE: tl.constexpr, COUNT: tl.constexpr):
    """Makes the constants of a few tensors, and leaves them for apply."""
    row = numbers + t * CONSTANTS
    wide = tl.full((), 1 if numbers.dtype.element_ty == tl.float64 else 0, tl.int32)
    made = PREPARE(h, x + (wide,))
    tl.store(row, coef, mask=mask)
    tl.store(row + 1, bound, mask=mask)
    tl.store(row + 2, x[FIRST], mask=mask)
    for i in tl.static_range(COUNT):
        tl.store(row + OWN + i, made[i], mask=mask)


@triton.jit(do_not_specialize=["members", "chunks", "groups"])
def finalize(
    tensors,
    gradients,
    hypers,
    amp,
    partials,
    flags,
    ranges,
    member,
    fresh,
    norms,
    coefs,
    known,
    numbers,
    keys,
    go,
    counters,
    spoiled,
    smallest,
    squares_of,
    torn,
    members,
    chunks,
    groups,
    PREPARE: tl.constexpr,
    HYPER: tl.constexpr,
    NUMBERS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    SCOPE: tl.constexpr,
    REDUCES: tl.constexpr,
    ASKS: tl.constexpr,
    NAMES: tl.constexpr,
    NOISY: tl.constexpr,
    SEEDED: tl.constexpr,
    COUNTS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    ROW_SPAN: tl.constexpr,
):
    """Takes tensors ROWS at a time; `member` says which."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = place < members
    t = tl.load(member + place, mask=mask, other=0)
    row = tensors + t.to(tl.int64) * ROW_WORDS
    g = tl.load(row + ROW_GROUP).to(tl.int32)
    group = hypers + g * GROUP_WORDS
    active = takes_part(row, gradients, t)

    # Does the step happen?
    unscale, overflow = loss_scale(amp)
    happens = (overflow == 0).to(tl.int32)  # a number: the interpreter cannot spread a truth value
    if PARTS:
        happens = happens & (tl.load(torn + 1) == 0).to(tl.int32)
    if ASKS:
        bad = any_flag(flags, 0, chunks, SPOILED, SPAN)
        if COUNTS:
            if (tl.program_id(0) == 0) & (bad != 0) & (happens != 0):
                tl.store(counters, tl.load(counters) + 1)
        if NAMES:
            mine = any_flag_rows(
                flags, tl.load(row + ROW_FIRST), tl.load(row + ROW_CHUNKS), SPOILED, ROWS, ROW_SPAN
            )
            tl.store(spoiled + t, 1, mask=mask & (mine * happens != 0))
        happens = happens & (bad == 0).to(tl.int32)
    tl.store(go, happens)

    # Norms, coefficients.
    coef = tl.full([ROWS], 1.0, tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    summed = tl.zeros([ROWS], tl.float64)  # of squares, after the clip
    moves = active.to(tl.int32)
    if REDUCES:
        if SCOPE == TENSOR:
            first = tl.load(row + ROW_FIRST)
            count = tl.load(row + ROW_CHUNKS)
            total = fold_rows(partials, first, count, KIND, ROWS, ROW_SPAN)
            norm = norm_of(total, unscale, KIND, P)
            tl.store(norms + t, norm, mask=mask)
            coef = clip_coefficient(group, norm)
            summed = coef * unscale * (coef * unscale) * total
            if BY_ROWS:
                squares = fold_rows(squares_of, first, count, SQUARES, ROWS, ROW_SPAN)
                summed = tl.where(tl.load(group + GROUP_MODE) == MODE_ROWS, squares, summed)
        else:
            moves = g * 0
            low = 0
            high = 1
            if SCOPE == GROUP:
                low = tl.min(tl.where(mask, g, 0x7FFFFFFF), axis=0)
                high = tl.max(tl.where(mask, g, 0), axis=0) + 1
            for u in range(low, high):
                if SCOPE == GROUP:
                    value = fold(partials, tl.load(ranges + u), tl.load(ranges + u + 1), KIND, SPAN)
                else:
                    value = fold(partials, 0, chunks, KIND, SPAN)
                norm = norm_of(value, unscale, KIND, P)
                tl.store(norms + u, norm)
                here = g == g
                if SCOPE == GROUP:
                    here = g == u
                coef = tl.where(here, clip_coefficient(group, norm + coef * 0), coef)
                if ACCUMULATE is not None:
                    squares = tl.full((), 0.0, tl.float64)
                    found = tl.full((), 0, tl.int32)
                    begin = u
                    stop = u + 1
                    if SCOPE == GLOBAL:
                        begin = 0
                        stop = groups
                    for v in range(begin, stop):
                        other = hypers + v * GROUP_WORDS
                        if tl.load(other + GROUP_COUNTS) != 0:
                            a = tl.load(ranges + v)
                            b = tl.load(ranges + v + 1)
                            factor = clip_coefficient(other, norm) * unscale
                            more = factor * factor * fold(partials, a, b, KIND, SPAN)
                            if BY_ROWS:
                                if tl.load(other + GROUP_MODE) == MODE_ROWS:
                                    more = fold(squares_of, a, b, SQUARES, SPAN)
                            squares += more
                            found = found | any_flag(flags, a, b, PRESENT, SPAN)
                    summed = tl.where(here, squares, summed)
                    moves = tl.where(here, found, moves)
        if BY_ROWS:
            first = tl.load(row + ROW_FIRST)
            least = least_rows(smallest, first, tl.load(row + ROW_CHUNKS), ROWS, ROW_SPAN)
            coef = tl.where(tl.load(group + GROUP_MODE) == MODE_ROWS, least, coef)
        tl.store(coefs + t, tl.where(active, coef, 1.0), mask=mask)

    # What rules may ask for.
    h = gather(hypers, g * GROUP_WORDS, HYPER)
    coef = coef * unscale
    if BY_ROWS:  # each row has its own, which undoes the scale as well
        coef = tl.where(tl.load(group + GROUP_MODE) == MODE_ROWS, 1.0, coef)
    coef = coef * tl.load(group + GROUP_SIGN)
    bound = tl.load(group + GROUP_VALUE)
    # Not 0: what was allocated for it waits for a step that happens.
    first = tl.load(fresh + t, mask=mask, other=0) == 1
    steps_at, counted, steps = number_at(tl.load(row + ROW_STEPS), mask, tl.float32)
    norm_at, held, before = number_at(tl.load(row + ROW_NORM), mask, tl.float64)
    after = before
    if ACCUMULATE is not None:
        after = tl.where(moves != 0, ACCUMULATE(h, before, summed), before)
    _, _, scale = number_at(tl.load(row + ROW_SCALE), mask, tl.float64)
    none = tl.zeros([ROWS], tl.float64)
    picked = tl.load(row + ROW_PICKED).to(tl.float64, bitcast=True)
    sums = (none, none, none, none, none)
    x = (first.to(tl.float64), steps + 1.0, coef, before, after, scale, picked) + sums
    for i in tl.static_range(KNOWN):
        tl.store(known + t * KNOWN + i, x[i], mask=mask)
    keep_constants(numbers, t, mask, x, coef, bound, h, PREPARE, NUMBERS)
    if NOISY:
        key = noise_key(steps.to(tl.int64), t.to(tl.int64))
        tl.store(keys + t * KEY_WORDS + KEY_NOISE, key[0], mask=mask)
        tl.store(keys + t * KEY_WORDS + KEY_NOISE + 1, key[1], mask=mask)
    if SEEDED:  # halves of a seed are the last hyper-parameters
        for i in tl.static_range(2):
            half = h[HYPER - 2 + i].to(tl.int64).to(tl.uint32)
            tl.store(keys + t * KEY_WORDS + KEY_SEED + i, half, mask=mask)
    tl.store(keys + t * KEY_WORDS + KEY_STEP, steps.to(tl.int64).to(tl.uint32), mask=mask)

    # What changes with a step that happens.
    done = mask & (t * 0 + happens != 0)
    tl.store(steps_at, (steps + 1.0).to(tl.float32), mask=done & active & counted)
    tl.store(norm_at, after, mask=done & held)
    tl.store(fresh + t, 0, mask=done & active)


@triton.jit(do_not_specialize=["members", "chunks"])
def finish_pass(
    tensors,
    gradients,
    hypers,
    sums,
    lengths,
    ranges,
    member,
    known,
    numbers,
    go,
    members,
    chunks,
    PREPARE: tl.constexpr,
    HYPER: tl.constexpr,
    NUMBERS: tl.constexpr,
    PASS: tl.constexpr,
    SUM: tl.constexpr,
    SCOPE: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    ROW_SPAN: tl.constexpr,
):
    """After a pass: its sums become what STAGE says, and all constants are made again."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = place < members
    t = tl.load(member + place, mask=mask, other=0)
    row = tensors + t.to(tl.int64) * ROW_WORDS
    g = tl.load(row + ROW_GROUP).to(tl.int32)
    total = tl.zeros([ROWS], tl.float64)
    elements = tl.load(row + ROW_NUMEL).to(tl.float64)
    if SCOPE == TENSOR:
        first = tl.load(row + ROW_FIRST)
        total = fold_rows(sums, first, tl.load(row + ROW_CHUNKS), SQUARES, ROWS, ROW_SPAN)
    elif SCOPE == GLOBAL:
        total += fold(sums, 0, chunks, SQUARES, SPAN)
        elements = total * 0 + fold(lengths, 0, chunks, SQUARES, SPAN)
    else:
        low = tl.min(tl.where(mask, g, 0x7FFFFFFF), axis=0)
        for u in range(low, tl.max(tl.where(mask, g, 0), axis=0) + 1):
            a = tl.load(ranges + u)
            b = tl.load(ranges + u + 1)
            total = tl.where(g == u, fold(sums, a, b, SQUARES, SPAN), total)
            elements = tl.where(g == u, fold(lengths, a, b, SQUARES, SPAN), elements)
    value = total * 0
    if SUM == 1:
        value = total / elements
    elif SUM == 2:
        value = tl.sqrt(total)
    tl.store(known + t * KNOWN + STAGE + PASS, value, mask=mask)
    # In registers: what was just stored is not yet to be read.
    x = gather(known, t * KNOWN, KNOWN)
    x = x[: STAGE + PASS] + (value,) + x[STAGE + PASS + 1 :]
    h = gather(hypers, g * GROUP_WORDS, HYPER)
    bound = tl.load(hypers + g * GROUP_WORDS + GROUP_VALUE)
    keep_constants(numbers, t, mask, x, x[COEF], bound, h, PREPARE, NUMBERS)
    if KEEPS:
        at = tl.load(row + ROW_SCALE)
        active = takes_part(row, gradients, t)
        done = mask & (at != 0) & active & (t * 0 + tl.load(go) != 0)
        tl.store(at.to(tl.pointer_type(tl.float64)), value, mask=done)
