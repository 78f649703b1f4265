"""codec: messages of numbers that are rounded at random. Twin of csrc/cpu/codec.cpp.

Natural compression: a byte with the exponent per number, then a bit with its sign. QSGD: a unit per
block, then numbers of a few bits. The CPU kernels' bytes: a unit's sum is taken in their order, in
eight lanes, which are added up as pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, float32, float64

from .codec_bytes import (
    BLOCK,
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
from .compress import DITHERED, dithered_steps, natural, scales
from .draw import blocks, in_order
from .launch import Spec
from .ops import root, word

CHUNK = 1 << 15  # elements that are summed up together: kCodecChunk of csrc/cpu/codec.h
# Chunks, or shorter blocks, that a program sums up: a lane each of theirs to a thread.
PIECES = 4
# Blocks whose units a program makes, where they have several chunks.
UNITS = 32


@triton.jit
def bits_for(first, low, high, step, tensor, N: tl.constexpr):
    """Random bits for N elements."""
    key = (0, 0, word(step), word(low), word(high), word(tensor))
    a, b, c, d = blocks(first, key, word(tensor) * 0, N)
    return in_order(a, b, c, d)


# ---- natural compression -------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "low", "high", "step", "tensor"])
def code_natural_kernel(
    g,
    e,
    out,
    message,
    n,
    a,
    b,
    low,
    high,
    step,
    tensor,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exponents, then signs; what is left of x into `out`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    live = at < n
    x = evaluated(g, e, at, live, a, b, ADDS)
    sent = natural(x, bits_for(first, low, high, step, tensor, BLOCK))
    tl.store(out + at, x - sent, live)
    coded = sent.to(tl.uint32, bitcast=True)
    tl.store(message + at, (coded >> 23).to(tl.uint8), live)
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    negative = tl.where(live, coded >> 31, 0)
    tl.store(message + n + byte, packed(negative, BLOCK), byte * 8 < n)


@triton.jit(do_not_specialize=["n", "stride", "ranks"])
def sum_natural_kernel(
    messages, out, base, n, stride, ranks, factor, BASE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums over ranks, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    total = tl.zeros([BLOCK], tl.float32)
    row = messages
    for _ in range(ranks):
        exponent = tl.load(row + at, live, 0).to(tl.uint32)
        signs = tl.load(row + n + at // 8, live, 0).to(tl.uint32)
        negative = (signs >> (at % 8).to(tl.uint32)) & 1
        total += ((exponent << 23) | (negative << 31)).to(tl.float32, bitcast=True)
        row += stride
    finish(out, base, at, live, total, factor, BASE)


# ---- QSGD ----------------------------------------------------------------------------------------


@triton.jit
def put_units(message, units, inverses, b, live, total, levels):
    """What blocks are multiplied by, and divided by, of their sums of squares."""
    level = (total * 0 + 1) * levels.to(tl.float64)
    unit, inverse = scales(DITHERED, level, root(total), 0)
    unit = unit.to(tl.float32)
    tl.store(units + b, unit, live)
    tl.store(inverses + b, inverse.to(tl.float32), live)
    put_float(message + 4 * b, unit, live)


@triton.jit(do_not_specialize=["n", "size", "pieces", "levels"])
def squares_kernel(
    g,
    e,
    partials,
    message,
    units,
    inverses,
    n,
    size,
    pieces,
    a,
    b,
    levels,
    ADDS: tl.constexpr,
    WHOLE: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of squares of chunks of blocks; WHOLE: a block is one, and has its unit at once."""
    p = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    block = p // pieces
    begin = block * size + p % pieces * CHUNK
    end = tl.minimum(tl.minimum(begin + CHUNK, block * size + size), n)
    lane = tl.arange(0, 8)[None, :]
    total = tl.zeros([PIECES, 8], tl.float64)
    longest = tl.max(end - begin, 0)
    for i in range(0, longest.to(tl.int32), 8):
        at = begin[:, None] + i + lane
        x = evaluated(g, e, at, at < end[:, None], a, b, ADDS).to(tl.float64)
        total += x * x
    # Sums of two numbers, which have no order.
    total = tl.sum(tl.reshape(total, [PIECES, 2, 4]), 1)
    total = tl.sum(tl.reshape(total, [PIECES, 2, 2]), 1)
    total = tl.sum(total, 1)
    if WHOLE:
        put_units(message, units, inverses, p, begin < n, total, levels)
    else:
        tl.store(partials + p, total, block * size < n)


@triton.jit(do_not_specialize=["count", "pieces", "levels"])
def units_kernel(partials, message, units, inverses, count, pieces, levels, UNITS: tl.constexpr):
    """Units of blocks, of the sums of their chunks in their order."""
    block = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    live = block < count
    total = tl.zeros([UNITS], tl.float64)
    for i in range(pieces):
        total += tl.load(partials + block * pieces + i, live, 0.0)
    put_units(message, units, inverses, block, live, total, levels)


@triton.jit(do_not_specialize=["n", "size", "low", "high", "step", "tensor", "levels", "width"])
def code_levels_kernel(
    g,
    e,
    out,
    message,
    units,
    inverses,
    n,
    size,
    a,
    b,
    low,
    high,
    step,
    tensor,
    levels,
    width,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Numbers behind the units, the lowest bit being the sign; what is left of x into `out`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    live = at < n
    x = evaluated(g, e, at, live, a, b, ADDS)
    unit = tl.load(units + at // size, live, 0.0)
    inverse = tl.load(inverses + at // size, live, 0.0)
    drawn = bits_for(first, low, high, step, tensor, BLOCK)
    steps = dithered_steps(x, drawn, inverse, levels.to(tl.float32))
    sent = steps * unit
    sent = tl.where(x < 0, -sent, sent)
    tl.store(out + at, x - sent, live)
    one = tl.full([BLOCK], 1, tl.uint64)
    most = (one << (one * width)) - 1
    number = ((steps.to(tl.int64).to(tl.uint64) << 1) | (sent < 0).to(tl.uint64)) & most
    number = tl.reshape(tl.where(live, number, 0), [BLOCK // 8, 8])
    # Eight numbers fill `width` bytes: words of 64 bits, and their bytes.
    lane = tl.arange(0, 8)[None, :]
    group = first // 8 + tl.arange(0, BLOCK // 8)[:, None]
    to = message + (n + size.to(tl.int64) - 1) // size * 4
    for j in tl.static_range(3):
        if 8 * j < width:
            left = lane * width - 64 * j
            up = number << tl.minimum(tl.maximum(left, 0), 63).to(tl.uint64)
            down = number >> tl.minimum(tl.maximum(-left, 0), 63).to(tl.uint64)
            here = tl.where(left < 0, down, tl.where(left < 64, up, 0))
            whole = tl.sum(here, 1)[:, None]
            byte = 8 * j + lane
            place = group * width + byte
            inside = (byte < width) & (place * 8 // width < n)
            tl.store(to + place, (whole >> (8 * lane).to(tl.uint64)).to(tl.uint8), inside)


@triton.jit(do_not_specialize=["n", "size", "stride", "ranks", "width"])
def sum_levels_kernel(
    messages,
    out,
    base,
    n,
    size,
    stride,
    ranks,
    width,
    factor,
    BASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over ranks, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    total = tl.zeros([BLOCK], tl.float32)
    row = messages
    for _ in range(ranks):
        unit = float_at(row + at // size * 4, live)
        number = number_at(row + (n + size.to(tl.int64) - 1) // size * 4, at, width, live, 4)
        part = (number >> 1).to(tl.float32) * unit
        total += tl.where((number & 1) != 0, -part, part)
        row += stride
    finish(out, base, at, live, total, factor, BASE)


SPECS = {
    "code natural": Spec(code_natural_kernel, (("ADDS", True), ("BLOCK", BLOCK)), WARPS),
    "sum natural": Spec(sum_natural_kernel, (("BASE", True), ("BLOCK", BLOCK)), WARPS),
    "squares": Spec(
        squares_kernel,
        (("ADDS", True), ("WHOLE", False), ("PIECES", PIECES), ("CHUNK", CHUNK)),
        PIECES * 8 // 32,
    ),
    "units": Spec(units_kernel, (("UNITS", UNITS),), 1),
    "code levels": Spec(code_levels_kernel, (("ADDS", True), ("BLOCK", BLOCK)), WARPS),
    "sum levels": Spec(sum_levels_kernel, (("BASE", True), ("BLOCK", BLOCK)), WARPS),
}
Key = tuple[int, int, int]  # seed, step, tensor


def _words(key: Key) -> tuple[int, int, int, int]:
    seed, step, tensor = key
    return signed(seed), signed(seed >> 32), signed(step), signed(tensor)


def code_natural(
    g: Tensor, e: Tensor | None, a: float, b: float, key: Key, out: Tensor, message: Tensor
) -> None:
    """Writes C(x) of natural compression into `message`, and x - C(x) into `out`."""
    n, other = len(out), g if e is None else e
    arguments = (g, other, out, message, n, a, b, *_words(key))
    run(SPECS["code natural"], -(-n // BLOCK), *arguments, ADDS=e is not None)


def sum_natural(messages: Tensor, factor: float, base: Tensor | None, out: Tensor) -> None:
    """Out = base + factor * the sum over ranks of such messages; a row is a rank's."""
    n, other = len(out), out if base is None else base
    arguments = (messages, out, other, n, messages.stride(0), len(messages), factor)
    run(SPECS["sum natural"], -(-n // BLOCK), *arguments, BASE=base is not None)


def code_levels(
    g: Tensor,
    e: Tensor | None,
    a: float,
    b: float,
    key: Key,
    levels: int,
    size: int,
    out: Tensor,
    message: Tensor,
) -> None:
    """Writes C(x) of QSGD into `message`, and x - C(x) into `out`; blocks are of `size` elements.

    Two launches, or three where blocks are longer than 32,768 elements.
    """
    n, other, flags = len(out), g if e is None else e, {"ADDS": e is not None}
    count, pieces = -(-n // size), -(-size // CHUNK)
    units, inverses = (empty(count, dtype=float32, device=out.device) for _ in range(2))
    several = pieces > 1
    partials = empty(count * pieces if several else 1, dtype=float64, device=out.device)
    made = (message, units, inverses)
    programs = -(-count * pieces // PIECES)
    arguments = (g, other, partials, *made, n, size, pieces, a, b, levels)
    run(SPECS["squares"], programs, *arguments, WHOLE=not several, **flags)
    if several:
        run(SPECS["units"], -(-count // UNITS), partials, *made, count, pieces, levels)
    drawn = (*_words(key), levels, 1 + levels.bit_length())
    arguments = (g, other, out, *made, n, size, a, b, *drawn)
    run(SPECS["code levels"], -(-n // BLOCK), *arguments, **flags)


def sum_levels(
    messages: Tensor, levels: int, size: int, factor: float, base: Tensor | None, out: Tensor
) -> None:
    """Out = base + factor * the sum over ranks of such messages; a row is a rank's."""
    n, other = len(out), out if base is None else base
    rows = (messages.stride(0), len(messages), 1 + levels.bit_length(), factor)
    arguments = (messages, out, other, n, size, *rows)
    run(SPECS["sum levels"], -(-n // BLOCK), *arguments, BASE=base is not None)
