"""codec: what the kernels of messages share. Bytes of a message lie at any address."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Spec

# Elements that a program takes, in whole bytes of bits. Reasoned, not measured.
BLOCK = 1024
WARPS = 4


@triton.jit
def evaluated(g, e, at, live, a, b, ADDS: tl.constexpr):
    """What is sent: a * g, or b * e + a * g; 0 where nothing is."""
    x = tl.load(g + at, live, 0.0) * a
    if ADDS:
        x = tl.load(e + at, live, 0.0) * b + x
    return x


@triton.jit
def packed(marks, N: tl.constexpr):
    """N marks, 0 or 1, as N / 8 bytes: the first one is the lowest bit."""
    place = tl.arange(0, 8)[None, :]
    return tl.sum(tl.reshape(marks.to(tl.int32), [N // 8, 8]) << place, 1).to(tl.uint8)


@triton.jit
def put_float(to, x, mask):
    """Four bytes."""
    bits = x.to(tl.uint32, bitcast=True)
    for i in tl.static_range(4):
        tl.store(to + i, (bits >> (8 * i)).to(tl.uint8), mask)


@triton.jit
def float_at(where, mask):
    """Four bytes as a number."""
    bits = tl.load(where, mask, 0).to(tl.uint32)
    for i in tl.static_range(1, 4):
        bits |= tl.load(where + i, mask, 0).to(tl.uint32) << (8 * i)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def number_at(message, place, width, mask, SPAN: tl.constexpr):
    """Number `place` of those of `width` bits that a message holds: it lies in SPAN bytes.

    Reads what lies behind the last one only where `mask` says.
    """
    bit = place * width
    last = (bit + width - 1) // 8
    word = tl.load(message + bit // 8, mask, 0).to(tl.uint64)
    for i in tl.static_range(1, SPAN):
        inside = mask & (bit // 8 + i <= last)
        word |= tl.load(message + bit // 8 + i, inside, 0).to(tl.uint64) << (8 * i)
    one = (bit * 0 + 1).to(tl.uint64)
    mine = (one << (width + bit * 0).to(tl.uint64)) - 1
    return ((word >> (bit % 8).to(tl.uint64)) & mine).to(tl.int64)


@triton.jit
def finish(out, base, at, live, total, factor, BASE: tl.constexpr):
    """out = base + factor * total."""
    total = total * factor
    if BASE:
        total += tl.load(base + at, live, 0.0)
    tl.store(out + at, total, live)


def run(spec: Spec, programs: int, *arguments: Any, **constants: Any) -> None:
    """A launch, with other values of some constants."""
    spec = spec.having(**constants)
    spec.kernel[(programs,)](*arguments, **dict(spec.constants), **spec.options)


def signed(word: int) -> int:
    """A word of 32 bits as an integer with a sign: Triton then has one type for all of them."""
    return (word & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)
