"""codec: messages about some coordinates: where they are, unless that is drawn, and their values.

The k largest are found exactly, of equals the first ones, with zeros where there are no others: the
CPU kernels' choice. Digits of the k-th magnitude are found one after another, in a number of
launches that never changes; then each chunk of elements knows how many were chosen before it. No
launch waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codec import pack_bits
from .codec_bytes import (
    WARPS,
    evaluated,
    finish,
    float_at,
    number_at,
    packed,
    put_float,
    run,
    signed,
)
from .launch import Spec
from .ops import magnitude, word
from .rand_k import permuted
from .sample import DIGITS
from .tuning import INTERPRETED

# Elements that a program takes, so many at a time. The interpreter likes them all at once.
CHUNK = 8192
BLOCK = CHUNK if INTERPRETED else 1024
# Of the 31 bits of a magnitude: how far to the right a digit is, and how many bits it has.
FIRST, OTHERS = 20, ((9, 11), (0, 9))
# What is known of the k-th largest: its digits so far, how many that are equal so far are among the
# k; and how many numbers are not finite.
KEY, LEFT, SPOILED = (tl.constexpr(i) for i in range(3))


# ---- the k largest -------------------------------------------------------------------------------


@triton.jit
def tally(histogram, found):
    """Adds what a program has counted to what all have."""
    d = tl.arange(0, DIGITS)
    tl.atomic_add(histogram + d, found.to(tl.int64), mask=found > 0)


@triton.jit(do_not_specialize=["n"])
def weigh_kernel(
    g,
    e,
    out,
    histogram,
    n,
    a,
    b,
    FIRST: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x into `out`, and how often its magnitude begins with each digit."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    found = tl.zeros([DIGITS], tl.int32)
    for i in range(0, CHUNK, BLOCK):
        at = first + i + tl.arange(0, BLOCK)
        live = at < n
        x = evaluated(g, e, at, live, a, b, ADDS)
        tl.store(out + at, x, live)
        key = magnitude(x, False)
        found += tl.histogram(tl.where(live, key >> FIRST, 0), DIGITS, mask=live)
    tally(histogram, found)


@triton.jit(do_not_specialize=["n", "shift", "width"])
def narrow_kernel(x, state, histogram, n, shift, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How often the next digit is which, where those before it are the k-th's."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    prefix = tl.load(state + KEY).to(tl.int32) >> (shift + width)
    found = tl.zeros([DIGITS], tl.int32)
    for i in range(0, CHUNK, BLOCK):
        at = first + i + tl.arange(0, BLOCK)
        key = magnitude(tl.load(x + at, at < n, 0.0), False)
        same = (at < n) & ((key >> (shift + width)) == prefix)
        digit = (key >> shift) & ((1 << width) - 1)
        found += tl.histogram(tl.where(same, digit, 0), DIGITS, mask=same)
    tally(histogram, found)


@triton.jit(do_not_specialize=["k", "shift"])
def settle_kernel(state, histogram, k, shift, FIRST: tl.constexpr):
    """Which digit the k-th has; the histogram is empty again."""
    d = tl.arange(0, DIGITS)
    have = tl.load(histogram + d)
    if shift == FIRST:
        left = tl.full((), 0, tl.int64) + k
        key = tl.full((), 0, tl.int64)
        spoiled = tl.where(d >= (0x7F800000 >> FIRST), have, 0)
        tl.store(state + SPOILED, tl.sum(spoiled, axis=0))
    else:
        left = tl.load(state + LEFT)
        key = tl.load(state + KEY)
    at_least = tl.sum(have, axis=0) - tl.cumsum(have, axis=0) + have
    pick = tl.sum((at_least >= left).to(tl.int32), axis=0) - 1
    left -= tl.sum(tl.where(d == pick, at_least - have, 0), axis=0)
    tl.store(histogram + d, tl.zeros([DIGITS], tl.int64))
    tl.store(state + KEY, key | (pick.to(tl.int64) << shift))
    tl.store(state + LEFT, left)


@triton.jit(do_not_specialize=["n"])
def count_kernel(x, state, counts, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """How many of a chunk are larger than the k-th, and how many equal to it."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    last = tl.load(state + KEY)
    larger = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for i in range(0, CHUNK, BLOCK):
        at = first + i + tl.arange(0, BLOCK)
        key = magnitude(tl.load(x + at, at < n, 0.0), False)
        larger += tl.sum(((at < n) & (key > last)).to(tl.int32), axis=0)
        equal += tl.sum(((at < n) & (key == last)).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0), larger.to(tl.int64))
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), equal.to(tl.int64))


@triton.jit(do_not_specialize=["n", "room"])
def emit_kernel(
    x,
    state,
    ends,
    index,
    message,
    n,
    room,
    KEEPS: tl.constexpr,
    BITMAP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The chosen ones of a chunk: their values, where they are, and nothing left of them.

    `ends` counts up to the end of each chunk.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * CHUNK
    last = tl.load(state + KEY)
    left = tl.load(state + LEFT)
    before = ends + program - 1
    larger = tl.load(before, program > 0, 0)
    equals = tl.load(before + tl.num_programs(0), program > 0, 0)
    taken = larger + tl.minimum(equals, left)
    for i in range(0, CHUNK, BLOCK):
        at = first + i + tl.arange(0, BLOCK)
        live = at < n
        value = tl.load(x + at, live, 0.0)
        key = magnitude(value, False)
        equal = (live & (key == last)).to(tl.int32)
        turn = equals + tl.cumsum(equal, axis=0)
        chosen = live & ((key > last) | ((equal != 0) & (turn <= left)))
        marks = chosen.to(tl.int32)
        place = taken + tl.cumsum(marks, axis=0) - 1
        put_float(message + room + 4 * place, value, chosen)
        if BITMAP:
            byte = (first + i) // 8 + tl.arange(0, BLOCK // 8)
            tl.store(message + byte, packed(marks, BLOCK), byte < room)
        else:
            tl.store(index + place, at, chosen)
        if KEEPS:
            tl.store(x + at, tl.zeros([BLOCK], tl.float32), chosen)
        equals += tl.sum(equal, axis=0)
        taken += tl.sum(marks, axis=0)


@triton.jit(do_not_specialize=["k", "width", "room"])
def scatter_kernel(message, out, k, width, room, BLOCK: tl.constexpr):
    """One rank's values are added where its message says; no place comes twice."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = number_at(message, j, width, j < k, 5)
    total = tl.load(out + where, j < k, 0.0) + float_at(message + room + 4 * j, j < k)
    tl.store(out + where, total, j < k)


@triton.jit(do_not_specialize=["room", "stride"])
def marks_kernel(messages, counts, room, stride, CHUNK: tl.constexpr):
    """How many bits of each chunk of a rank's bitmap are set."""
    byte = tl.program_id(0).to(tl.int64) * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
    row = messages + tl.program_id(1).to(tl.int64) * stride
    marks = tl.load(row + byte, byte < room, 0).to(tl.int32)
    found = tl.full((), 0, tl.int32)
    for i in tl.static_range(8):
        found += tl.sum((marks >> i) & 1, axis=0)
    to = counts + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(to, found.to(tl.int64))


@triton.jit(do_not_specialize=["n", "k", "room", "stride", "ranks"])
def spread_kernel(
    messages,
    ends,
    out,
    base,
    n,
    k,
    room,
    stride,
    ranks,
    factor,
    BASE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums over ranks, in their order: the next value wherever a bit is set."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    row = messages
    before = ends + tl.program_id(0) - 1
    for _ in range(ranks):
        bits = tl.load(row + at // 8, at < n, 0).to(tl.int32)
        mark = tl.where(at < n, (bits >> (at % 8).to(tl.int32)) & 1, 0)
        place = tl.load(before, tl.program_id(0) > 0, 0) + tl.cumsum(mark, axis=0) - 1
        total += float_at(row + room + 4 * place, (mark != 0) & (place < k))
        row += stride
        before += tl.num_programs(0)
    finish(out, base, at, at < n, total, factor, BASE)


# ---- coordinates that are drawn ------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def combine_kernel(g, e, out, n, a, b, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """x into `out`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, evaluated(g, e, at, at < n, a, b, ADDS), at < n)


@triton.jit
def drawn_places(j, k, n, low, high, step, tensor):
    """The first k elements of a permutation of n."""
    # Those past the end might be walked for ever.
    one = tl.where(j < k, j, 0)
    size = tl.full((), 0, tl.int64) + n
    return permuted(one, size, word(low), word(high), word(step), word(tensor))


@triton.jit(do_not_specialize=["n", "k", "low", "high", "step", "tensor"])
def pick_kernel(out, message, n, k, low, high, step, tensor, factor, BLOCK: tl.constexpr):
    """The chosen ones, times a factor; what is left of them stays."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = drawn_places(j, k, n, low, high, step, tensor)
    kept = tl.load(out + where, j < k, 0.0)
    sent = kept * factor
    put_float(message + 4 * j, sent, j < k)
    tl.store(out + where, kept - sent, j < k)


@triton.jit(do_not_specialize=["n", "k", "low", "high", "step", "tensor"])
def drop_kernel(message, out, n, k, low, high, step, tensor, BLOCK: tl.constexpr):
    """One rank's values are added where it has drawn."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = drawn_places(j, k, n, low, high, step, tensor)
    total = tl.load(out + where, j < k, 0.0) + float_at(message + 4 * j, j < k)
    tl.store(out + where, total, j < k)


_SIZES = (("BLOCK", BLOCK), ("CHUNK", CHUNK))
SPECS = {
    "weigh": Spec(weigh_kernel, (("FIRST", FIRST), ("ADDS", True), *_SIZES), WARPS),
    "narrow": Spec(narrow_kernel, _SIZES, WARPS),
    "settle": Spec(settle_kernel, (("FIRST", FIRST),), WARPS),
    "count": Spec(count_kernel, _SIZES, WARPS),
    "emit": Spec(emit_kernel, (("KEEPS", True), ("BITMAP", False), *_SIZES), WARPS),
    "emit bitmap": Spec(emit_kernel, (("KEEPS", True), ("BITMAP", True), *_SIZES), WARPS),
    "scatter": Spec(scatter_kernel, (("BLOCK", BLOCK),), WARPS),
    "marks": Spec(marks_kernel, (("CHUNK", BLOCK),), WARPS),
    "spread": Spec(spread_kernel, (("BASE", True), ("CHUNK", BLOCK)), WARPS),
    "combine": Spec(combine_kernel, (("ADDS", True), ("BLOCK", BLOCK)), WARPS),
    "pick": Spec(pick_kernel, (("BLOCK", BLOCK),), WARPS),
    "drop": Spec(drop_kernel, (("BLOCK", BLOCK),), WARPS),
}


def _form(n: int, k: int) -> tuple[int, bool, int]:
    """Bits of a place, whether it is a bitmap that is sent, and bytes of all places."""
    width = (n - 1).bit_length()
    return width, n < k * width, -(-min(k * width, n) // 8)


def code_top_k(
    g: Tensor, e: Tensor | None, a: float, b: float, k: int, out: Tensor | None, message: Tensor
) -> Tensor:
    """Places and values of the k largest into `message`, x without them into `out`.

    Returns how many numbers are not finite.
    """
    n, device = len(g), g.device
    width, bitmap, size = _form(n, k)
    programs = -(-n // CHUNK)
    x = torch.empty(n, device=device) if out is None else out
    state = torch.empty(3, dtype=torch.int64, device=device)
    histogram = torch.zeros(DIGITS.value, dtype=torch.int64, device=device)
    other = g if e is None else e
    run(SPECS["weigh"], programs, g, other, x, histogram, n, a, b, ADDS=e is not None)
    run(SPECS["settle"], 1, state, histogram, k, FIRST)
    for shift, bits in OTHERS:
        run(SPECS["narrow"], programs, x, state, histogram, n, shift, bits)
        run(SPECS["settle"], 1, state, histogram, k, shift)
    counts = torch.empty(2, programs, dtype=torch.int64, device=device)
    run(SPECS["count"], programs, x, state, counts, n)
    index = histogram if bitmap else torch.empty(k, dtype=torch.int64, device=device)
    spec = SPECS["emit bitmap" if bitmap else "emit"]
    given = (x, state, counts.cumsum(1), index, message, n, size)
    run(spec, programs, *given, KEEPS=out is not None)
    if not bitmap:
        pack_bits(index, width, message[:size])
    return state[SPOILED.value]


def sum_top_k(
    messages: Tensor, k: int, factor: float, base: Tensor | None, out: Tensor
) -> tuple[float, Tensor | None]:
    """Puts the sum over ranks of such messages into `out`; a row is a rank's.

    Returns the factor and the base that are left to be taken into account: for bitmaps, none. Of
    places there is a launch per rank, in their order: in one message none comes twice.
    """
    n, ranks, stride = len(out), len(messages), messages.stride(0)
    width, bitmap, size = _form(n, k)
    if not bitmap:
        out.zero_()
        for message in messages:
            run(SPECS["scatter"], -(-k // BLOCK), message, out, k, width, size)
        return factor, base
    programs = -(-n // BLOCK)
    counts = torch.empty(ranks, programs, dtype=torch.int64, device=out.device)
    spec = SPECS["marks"]
    spec.kernel[(programs, ranks)](
        messages, counts, size, stride, **dict(spec.constants), **spec.options
    )
    given = (messages, counts.cumsum(1), out, out if base is None else base)
    numbers = (n, k, size, stride, ranks, factor)
    run(SPECS["spread"], programs, *given, *numbers, BASE=base is not None)
    return 1.0, None


Key = tuple[int, int, int]  # seed, step, tensor


def _words(key: Key) -> Iterator[int]:
    seed, step, tensor = key
    return map(signed, (seed, seed >> 32, step, tensor))


def code_rand_k(
    g: Tensor,
    e: Tensor | None,
    a: float,
    b: float,
    key: Key,
    factor: float,
    out: Tensor,
    message: Tensor,
) -> None:
    """Values of coordinates that are drawn, times a factor, into `message`; the rest into `out`."""
    n, k, other = len(out), len(message) // 4, g if e is None else e
    run(SPECS["combine"], -(-n // BLOCK), g, other, out, n, a, b, ADDS=e is not None)
    run(SPECS["pick"], -(-k // BLOCK), out, message, n, k, *_words(key), factor)


def add_rand_k(message: Tensor, key: Key, out: Tensor) -> None:
    """Adds one rank's values to those of the ranks before it."""
    n, k = len(out), len(message) // 4
    run(SPECS["drop"], -(-k // BLOCK), message, out, n, k, *_words(key))
