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
from ..reference.codec import floats
from . import codec
from .codec import Drawn, Source, Target
from .schemes import index_bytes

__all__ = [
    "Draw",
    "Drawn",
    "Format",
    "Signs",
    "Source",
    "Target",
    "floats",
    "format_of",
    "raw",
    "seed_of",
]


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

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        """Writes C(x) into `message`, and x - C(x) into `out`; without `keep` that is not needed.

        Returns whether all of x is finite, and of what is left.
        """

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        """Sums over ranks, in their order; a row is a rank's message, from rank `first` on."""


def raw(x: Tensor) -> Tensor:
    """float32 as bytes."""
    return x.contiguous().view(torch.uint8)


class Signs:
    """A scale and a bit per number."""

    def size(self, d: int) -> int:
        """The scale, and d bits."""
        return 4 + -(-d // 8)

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        """The scale is the mean of |x|."""
        total = codec.code_signs(x.g, x.e, x.a, x.b, out if keep else None, message[4:])
        scale = (total / len(out)).float()
        message[:4] = raw(scale.reshape(1)).to(message.device)
        if keep:
            codec.subtract_signs(out, scale)
        return bool(scale.isfinite())

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        """The sum of scaled signs."""
        scales = floats(messages[:, :4]).reshape(-1)
        codec.sum_signs(messages[:, 4:], scales, into.factor, into.out)
        into.finish(1.0)


@dataclasses.dataclass(frozen=True)
class _TopK:
    compressor: compressors.TopK

    def size(self, d: int) -> int:
        k = self.compressor.chosen_of(d)
        return index_bytes(d, k) + 4 * k

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        k = self.compressor.chosen_of(len(out))
        return codec.code_top_k(x, k, out if keep else None, message)

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        codec.sum_top_k(messages, self.compressor.chosen_of(len(into.out)), into)


@dataclasses.dataclass(frozen=True)
class _RandK:
    compressor: compressors.RandK

    def size(self, d: int) -> int:
        return 4 * self.compressor.chosen_of(d)

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        d = len(out)
        factor = d / self.compressor.chosen_of(d) if self.compressor.scaled else 1.0
        codec.code_rand_k(x, _drawn(self, draw), factor, out, message)
        return codec.all_finite(out)

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        into.out.zero_()
        for rank, message in enumerate(messages, first):
            theirs = _drawn(self, dataclasses.replace(draw, rank=rank))
            codec.add_rand_k(message, theirs, into.out)
        into.finish()


@dataclasses.dataclass(frozen=True)
class _Natural:
    compressor: compressors.NaturalCompression

    def size(self, d: int) -> int:
        return d + -(-d // 8)

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        codec.code_natural(x, _drawn(self, draw), out, message)
        return codec.all_finite(out)

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        codec.sum_natural(messages, into)


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

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        levels, block = self.compressor.levels, self._block(len(out))
        codec.code_levels(x, _drawn(self, draw), levels, block, out, message)
        return codec.all_finite(out)

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        codec.sum_levels(messages, self.compressor.levels, self._block(len(into.out)), into)


class _Raw:
    def size(self, d: int) -> int:
        return 4 * d

    def encode(
        self, x: Source, draw: Draw, out: Tensor, message: Tensor, *, keep: bool = True
    ) -> bool:
        value = x.value()
        message.copy_(raw(value))
        out.zero_()
        return codec.all_finite(value)

    def decode(self, messages: Tensor, draw: Draw, into: Target, first: int = 0) -> None:
        into.out.zero_()
        for message in messages:
            into.out.add_(floats(message))
        into.finish()


def _drawn(form: Any, draw: Draw) -> Drawn:
    return Drawn(seed_of(form.compressor.seed, draw.rank), draw.step, draw.tensor)


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
