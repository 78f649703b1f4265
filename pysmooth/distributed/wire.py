"""What a compressor's message is made of, and what is made of the messages of all ranks.

A message about d float32 numbers takes `compressor.bits(d)` bits, rounded up to bytes (top-k sends
indices or a bitmap, whichever is shorter):

    TopK                  k places (packed indices, or d bits), k values
    RandK                 k values; places follow from the seed
    ScaledSign            the scale, d bits
    NaturalCompression    d exponents, d signs
    QSGD                  a unit per block, d numbers of 1 + ceil(log2(levels + 1)) bits
    Identity              d values

Floats are little-endian float32; bits and numbers are packed from the lowest bit on.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import compressors
from ..compressors import Compressor
from ..reference.compress import qsgd_units
from ..reference.random import permutation
from . import codec
from .schemes import index_bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """What is sent: b * e + a * g, b being 1 or -1. Flat, contiguous, float32."""

    g: Tensor
    e: Tensor | None = None
    a: float = 1.0
    b: float = 1.0

    def value(self) -> Tensor:
        """As a new tensor."""
        x = self.a * self.g
        return x if self.e is None else self.b * self.e + x


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which random numbers a compressor takes: those of a rank, a step and a tensor."""

    rank: int
    step: int
    tensor: int


class Format(Protocol):
    """The messages of one compressor."""

    def size(self, d: int) -> int:
        """Bytes about d numbers."""

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        """Writes C(x) into `message`, and x - C(x) into `out`."""

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        """Takes the sum over ranks, in their order, into `out`.

        A row is a rank's message, from rank `first` on.
        """


def floats(message: Tensor) -> Tensor:
    """Bytes as float32."""
    return message.clone(memory_format=torch.contiguous_format).view(torch.float32)


def raw(x: Tensor) -> Tensor:
    """float32 as bytes."""
    return x.contiguous().view(torch.uint8)


class Signs:
    """A scale and a bit per number."""

    def size(self, d: int) -> int:
        """The scale, and d bits."""
        return 4 + -(-d // 8)

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        """The scale is the mean of |x|."""
        total = codec.code_signs(x.g, x.e, x.a, x.b, out, message[4:])
        scale = (total / len(out)).float()
        message[:4] = raw(scale.reshape(1)).to(message.device)
        codec.subtract_signs(out, scale)

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        """The sum of scaled signs."""
        codec.sum_signs(messages[:, 4:], floats(messages[:, :4]).reshape(-1), 1.0, out)


@dataclasses.dataclass(frozen=True)
class _TopK:
    compressor: compressors.TopK

    def size(self, d: int) -> int:
        k = self.compressor.chosen_of(d)
        return index_bytes(d, k) + 4 * k

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        d, k = len(out), self.compressor.chosen_of(len(out))
        index, values = codec.code_top_k(x.g, x.e, x.a, x.b, k, out)
        packed = message[: index_bytes(d, k)]
        if _bitmap(d, k):
            marks = torch.zeros(d, dtype=torch.int64, device=out.device)
            marks[index] = 1
            codec.pack_bits(marks, 1, packed)
        else:
            codec.pack_bits(index, _width(d), packed)
        message[len(packed) :] = raw(values)

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        d, k = len(out), self.compressor.chosen_of(len(out))
        out.zero_()
        for message in messages:
            packed = message[: index_bytes(d, k)]
            if _bitmap(d, k):
                index = codec.unpack_bits(packed, d, 1).nonzero().reshape(-1)
            else:
                index = codec.unpack_bits(packed, k, _width(d))
            out[index] += floats(message[len(packed) :])


@dataclasses.dataclass(frozen=True)
class _RandK:
    compressor: compressors.RandK

    def size(self, d: int) -> int:
        return 4 * self.compressor.chosen_of(d)

    def _places(self, d: int, draw: Draw, device: torch.device) -> Tensor:
        c = _of_rank(self.compressor, draw.rank)
        k = c.chosen_of(d)
        return permutation(k, d, seed=c.seed, step=draw.step, tensor_id=draw.tensor).to(device)

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        out.copy_(x.value())
        index = self._places(len(out), draw, out.device)
        kept = out[index]
        sent = kept * (len(out) / len(index)) if self.compressor.scaled else kept
        message.copy_(raw(sent))
        out[index] = kept - sent

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        out.zero_()
        for rank, message in enumerate(messages, first):
            theirs = dataclasses.replace(draw, rank=rank)
            out[self._places(len(out), theirs, out.device)] += floats(message)


@dataclasses.dataclass(frozen=True)
class _Natural:
    compressor: compressors.NaturalCompression

    def size(self, d: int) -> int:
        return d + -(-d // 8)

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        value = x.value()
        sent = _of_rank(self.compressor, draw.rank)(value, step=draw.step, tensor_id=draw.tensor)
        bits = sent.view(torch.int32)
        message[: len(out)] = (bits >> 23 & 0xFF).to(torch.uint8)
        codec.pack_bits((bits < 0).long(), 1, message[len(out) :])
        out.copy_(value - sent)

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        out.zero_()
        for message in messages:
            size = (message[: len(out)].to(torch.int32) << 23).view(torch.float32)
            negative = codec.unpack_bits(message[len(out) :], len(out), 1) != 0
            out += torch.where(negative, -size, size)


@dataclasses.dataclass(frozen=True)
class _QSGD:
    compressor: compressors.QSGD

    def _width(self) -> int:
        return 1 + self.compressor.levels.bit_length()

    def _block(self, d: int) -> int:
        return min(self.compressor.scale_block or d, d)

    def _units(self, d: int) -> int:
        return -(-d // self._block(d))

    def size(self, d: int) -> int:
        return 4 * self._units(d) + -(-d * self._width() // 8)

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        value = x.value()
        d, block = len(out), self._block(len(out))
        sent = _of_rank(self.compressor, draw.rank)(value, step=draw.step, tensor_id=draw.tensor)
        info = torch.finfo(torch.float32)
        unit = qsgd_units(value, self.compressor.levels, block)
        unit = torch.where(unit < info.tiny, 0.0, unit.clamp(max=info.max)).float()
        each = unit.repeat_interleave(block)[:d]
        level = torch.where(each > 0, sent.abs() / each, 0.0).round().long()
        message[: 4 * len(unit)] = raw(unit)
        codec.pack_bits(level << 1 | (sent < 0), self._width(), message[4 * len(unit) :])
        out.copy_(value - sent)

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        d, units = len(out), self._units(len(out))
        out.zero_()
        for message in messages:
            each = floats(message[: 4 * units]).repeat_interleave(self._block(d))[:d]
            coded = codec.unpack_bits(message[4 * units :], d, self._width())
            size = (coded >> 1).float() * each
            out += torch.where((coded & 1) != 0, -size, size)


class _Raw:
    def size(self, d: int) -> int:
        return 4 * d

    def encode(self, x: Source, draw: Draw, out: Tensor, message: Tensor) -> None:
        message.copy_(raw(x.value()))
        out.zero_()

    def decode(self, messages: Tensor, draw: Draw, out: Tensor, first: int = 0) -> None:
        out.zero_()
        for message in messages:
            out += floats(message)


def _width(d: int) -> int:
    return (d - 1).bit_length()


def _bitmap(d: int, k: int) -> bool:
    return d < k * _width(d)


def _of_rank(compressor: Any, rank: int) -> Any:
    return dataclasses.replace(compressor, seed=seed_of(compressor.seed, rank))


def seed_of(seed: int, rank: int) -> int:
    """Ranks draw independently: each has a key of its own, rank 0 that of a single process."""
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**64


def format_of(compressor: Compressor) -> Format:
    """The format of a compressor's messages.

    Raises:
        TypeError: it is none of those that have one: its scope is wider than a tensor, or the
            size of its messages is not known.
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be one of pysmooth.compressors; got {compressor!r}")
    whole = getattr(compressor, "scope", "tensor") == "tensor"
    if isinstance(compressor, compressors.TopK) and whole:
        return _TopK(compressor)
    if isinstance(compressor, compressors.RandK):
        return _RandK(compressor)
    if isinstance(compressor, compressors.ScaledSign) and whole:
        return Signs()
    if isinstance(compressor, compressors.NaturalCompression):
        return _Natural(compressor)
    if isinstance(compressor, compressors.QSGD):
        return _QSGD(compressor)
    if isinstance(compressor, compressors.Identity):
        return _Raw()
    raise TypeError(
        f"compressor {compressor!r} cannot be sent: a message is about one tensor, and as long on "
        "every rank"
    )
