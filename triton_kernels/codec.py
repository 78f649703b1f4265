"""codec: bytes that leave the process: signs, and packed numbers. Twin of csrc/cpu/codec.cpp.

Bits are packed from the lowest on. Every number of a message is written by one thread, and sums are
taken in the order of ranks: a result has the same bits on every rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codec_bytes import BLOCK, WARPS, run
from .launch import Spec

# Bytes of a message that a program makes or reads: eight elements each. Reasoned, not measured.
BYTES = 256


@triton.jit
def code_signs_kernel(
    g, e, out, bits, partials, n, a, b, ADDS: tl.constexpr, KEEPS: tl.constexpr, BYTES: tl.constexpr
):
    """x = b * e + a * g into `out`, a bit where x >= 0, and partial sums of |x|."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    place = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + place
    live = at < n
    x = tl.load(g + at, live, 0.0) * a
    if ADDS:
        x = tl.load(e + at, live, 0.0) * b + x
    if KEEPS:
        tl.store(out + at, x, live)
    plus = ((x >= 0) & live).to(tl.int32)
    tl.store(bits + byte, tl.sum(plus << place, 1).to(tl.uint8), byte * 8 < n)
    size = tl.where(live, tl.abs(x), 0.0).to(tl.float64)
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(size, 1), 0))


@triton.jit
def subtract_signs_kernel(x, scale, n, BLOCK: tl.constexpr):
    """X -= scale * sign(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0)
    s = tl.load(scale)
    tl.store(x + at, value - tl.where(value >= 0, s, -s), at < n)


@triton.jit
def sum_signs_kernel(
    messages,
    scales,
    out,
    signs,
    n,
    stride,
    ranks,
    factor,
    SCALED: tl.constexpr,
    VOTES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """The sum over ranks of scale * sign, times a factor; or the signs of that sum."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    place = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + place
    total = tl.zeros([BYTES, 8], tl.float32)
    row = messages + byte
    for rank in range(ranks):
        coded = tl.load(row, byte * 8 < n, 0).to(tl.int32)
        if SCALED:
            size = tl.load(scales + rank)
        else:
            size = 1.0
        total += tl.where((coded[:, None] >> place) & 1 != 0, size, -size)
        row += stride
    if VOTES:
        plus = ((total >= 0) & (at < n)).to(tl.int32)
        tl.store(signs + byte, tl.sum(plus << place, 1).to(tl.uint8), byte * 8 < n)
    else:
        tl.store(out + at, total * factor, at < n)


@triton.jit
def pack_bits_kernel(numbers, packed, n, width, BYTES: tl.constexpr):
    """Numbers of `width` bits as bytes."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    place = tl.arange(0, 8)[None, :]
    bit = byte[:, None] * 8 + place
    number = tl.load(numbers + bit // width, bit // width < n, 0)
    one = ((number >> (bit % width)) & 1).to(tl.int32)
    tl.store(packed + byte, tl.sum(one << place, 1).to(tl.uint8), byte * 8 // width < n)


@triton.jit
def unpack_bits_kernel(packed, numbers, n, width, BLOCK: tl.constexpr):
    """Numbers of up to 32 bits: five bytes hold one, wherever it begins."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = at * width // 8
    word = tl.zeros([BLOCK], tl.int64)
    for i in tl.static_range(5):
        inside = (at < n) & ((first + i) * 8 // width < n)
        word |= tl.load(packed + first + i, inside, 0).to(tl.int64) << (8 * i)
    one = tl.full([BLOCK], 1, tl.int64)
    tl.store(numbers + at, (word >> (at * width % 8)) & ((one << width) - 1), at < n)


SPECS = {
    "code signs": Spec(
        code_signs_kernel, (("ADDS", True), ("KEEPS", True), ("BYTES", BYTES)), WARPS
    ),
    "subtract signs": Spec(subtract_signs_kernel, (("BLOCK", BLOCK),), WARPS),
    "sum signs": Spec(
        sum_signs_kernel, (("SCALED", True), ("VOTES", False), ("BYTES", BYTES)), WARPS
    ),
    "pack bits": Spec(pack_bits_kernel, (("BYTES", BYTES),), WARPS),
    "unpack bits": Spec(unpack_bits_kernel, (("BLOCK", BLOCK),), WARPS),
}


def _of(n: int, each: int) -> int:
    return -(-n // each)


def code_signs(
    g: Tensor, e: Tensor | None, a: float, b: float, out: Tensor | None, bits: Tensor
) -> Tensor:
    """Takes x = b * e + a * g into `out`, its signs into `bits`; returns the sum of |x|."""
    n = len(g)
    programs = _of(n, 8 * BYTES)
    partials = torch.empty(programs, dtype=torch.float64, device=g.device)
    other, kept = (g if e is None else e), (g if out is None else out)
    flags = {"ADDS": e is not None, "KEEPS": out is not None}
    run(SPECS["code signs"], programs, g, other, kept, bits, partials, n, a, b, **flags)
    return partials.sum()


def subtract_signs(x: Tensor, scale: Tensor) -> None:
    """X -= scale * sign(x), in place."""
    one = scale.to(x.device, torch.float32).reshape(1)
    run(SPECS["subtract signs"], _of(len(x), BLOCK), x, one, len(x))


def sum_signs(messages: Tensor, scales: Tensor | None, factor: float, out: Tensor) -> None:
    """Out = factor * the sum over ranks of scale * sign; a row is a rank's message."""
    n, rows = len(out), len(messages)
    numbers = out if scales is None else scales
    arguments = (messages, numbers, out, messages, n, messages.stride(0), rows, factor)
    run(SPECS["sum signs"], _of(n, 8 * BYTES), *arguments, SCALED=scales is not None)


def vote(messages: Tensor, n: int, signs: Tensor) -> None:
    """The signs of the sum of n signs over ranks; a tie is a plus."""
    unused = torch.empty(1, device=signs.device)
    arguments = (messages, unused, unused, signs, n, messages.stride(0), len(messages), 1.0)
    run(SPECS["sum signs"], _of(n, 8 * BYTES), *arguments, SCALED=False, VOTES=True)


def pack_bits(numbers: Tensor, width: int, out: Tensor) -> None:
    """Numbers (int64) of `width` bits, up to 32, as bytes."""
    if width:
        run(
            SPECS["pack bits"],
            _of(len(numbers) * width, 8 * BYTES),
            numbers,
            out,
            len(numbers),
            width,
        )


def unpack_bits(packed: Tensor, n: int, width: int) -> Tensor:
    """The n numbers of `pack_bits`, as int64."""
    numbers = torch.zeros(n, dtype=torch.int64, device=packed.device)
    if width:
        run(SPECS["unpack bits"], _of(n, BLOCK), packed, numbers, n, width)
    return numbers
