"""What clients sent in a round, held until all have answered, and summed up in one pass."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._clip_grad import get_total_norm
from .aggregate import add_dots, weighted_sum

_BLOCK = 8192  # elements: stretches of what lies on disk are multiples of it
_BYTES = 1 << 23  # read at a time, of all clients together; more only where a block of each is more


class UploadError(ValueError):
    """What a client sent cannot be taken; `reason` is what it is counted as."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Uploads:
    """Vectors of one round, by client.

    Sums are taken over clients in the order of their numbers, in float64, once all have answered:
    whoever came first, the bits are the same. Until then vectors are held: in memory as they came,
    or, with `folder`, in a temporary file there, so that a server of 100 clients keeps one of their
    vectors at a time, and of each a block of it while sums are taken.

    Args:
        size: elements of every vector.
        dtype: of every vector, float32 or float64.
        parts: vectors per client.
        folder: where to spill vectors; None keeps them in memory, without a copy.

    Raises:
        ValueError: `dtype` is another.
    """

    def __init__(
        self, size: int, dtype: torch.dtype, *, parts: int = 1, folder: str | Path | None = None
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
        self.size, self.dtype, self.parts = size, dtype, parts
        self.samples: dict[int, int] = {}
        self.norms: dict[int, tuple[float, ...]] = {}
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._slots: dict[int, int] = {}
        self._file: int | None = None
        if folder is not None:
            self._file, path = tempfile.mkstemp(dir=folder)
            Path(path).unlink()  # it is gone with its last reader, however the process ends
            weakref.finalize(self, os.close, self._file)

    @property
    def clients(self) -> list[int]:
        """Who was taken, in the order in which sums are taken."""
        return sorted(self.norms)

    def __len__(self) -> int:
        return len(self.norms)

    def add(self, client: int, vectors: object, samples: object = 1) -> None:
        """Takes what a client sent.

        Raises:
            UploadError: the wrong number of vectors, a wrong shape, layout or dtype, a number that
                is not finite, samples less than 1, or a second answer. Nothing was taken.
        """
        if client in self.norms:
            raise UploadError("duplicate", f"client {client} has answered already")
        if not isinstance(vectors, tuple) or len(vectors) != self.parts:
            raise UploadError("shape", f"client {client} must send {self.parts} vectors")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise UploadError("samples", f"client {client} says it has {samples!r} samples")
        for v in vectors:
            if not isinstance(v, Tensor) or v.shape != (self.size,):
                sent = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
                raise UploadError("shape", f"client {client} sent {sent}, not ({self.size},)")
            if v.layout != torch.strided or v.is_meta:
                raise UploadError("layout", f"client {client} sent a tensor that is not dense")
            if v.dtype != self.dtype:
                raise UploadError("dtype", f"client {client} sent {v.dtype}, not {self.dtype}")
        norms = tuple(float(get_total_norm([v])) for v in vectors)
        if not all(math.isfinite(norm) for norm in norms):
            raise UploadError("nonfinite", f"client {client} sent numbers that are not finite")
        flat = tuple(v.detach().resolve_neg().contiguous() for v in vectors)
        if self._file is None:
            self._held[client] = flat
        else:
            self._slots[client] = len(self._slots)
            for part, v in enumerate(flat):
                _write(self._file, v.cpu(), self._offset(client, part, 0))
        self.norms[client], self.samples[client] = norms, samples

    def combine(
        self, factors: Mapping[int, float], part: int = 0, out: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """The sum of factors[client] * vector, and its norm.

        Equivalent to::

            total = sum(factors[c] * vectors[c].double() for c in sorted(factors)).to(dtype)
            return total, vector_norm(total)

        with the clients' terms added up in pairs, and pairs of pairs.

        Args:
            factors: of the clients that count; others are left out.
            part: which of the vectors of each client.
            out: where to write the sum; a new vector by default.
        """
        order = sorted(factors)
        weights = [float(factors[c]) for c in order]
        norms = []
        if out is None:
            device = self._held[order[0]][part].device if self._held and order else None
            out = torch.empty(self.size, dtype=self.dtype, device=device)
        for begin, vectors in self._stretches(order, part):
            norms.append(weighted_sum(vectors, weights, out[begin : begin + len(vectors[0])]))
        return out, norms[0] if len(norms) == 1 else float(get_total_norm([out]))

    def dots(self, vector: Tensor, part: int = 0) -> Tensor:
        """The inner products of `vector` with the clients' vectors, in the order of `clients`."""
        total = torch.zeros(len(self), dtype=torch.float64)
        vector = vector.contiguous()
        for begin, vectors in self._stretches(self.clients, part):
            add_dots(vectors, vector[begin : begin + len(vectors[0])], total)
        return total

    def _stretches(self, order: list[int], part: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Where each stretch of the vectors begins, and it, of each client.

        All of them where they are in memory; else as they are read, into the same memory.
        """
        if not order:
            raise ValueError("no client is left to take a sum over")
        if self._file is None:
            yield 0, [self._held[client][part] for client in order]
            return
        blocks = max(1, _BYTES // (len(order) * self.dtype.itemsize * _BLOCK))
        length = max(1, min(self.size, blocks * _BLOCK))
        room = torch.empty(len(order), length, dtype=self.dtype)
        for begin in range(0, self.size, length):
            rows = room[:, : self.size - begin].unbind()
            for client, row in zip(order, rows, strict=True):
                self._read(row, client, self._offset(client, part, begin))
            yield begin, list(rows)

    def _offset(self, client: int, part: int, begin: int) -> int:
        vectors = self._slots[client] * self.parts + part
        return (vectors * self.size + begin) * self.dtype.itemsize

    def _read(self, row: Tensor, client: int, at: int) -> None:
        assert self._file is not None
        data, done = _bytes(row), 0
        while done < len(data):
            read = os.preadv(self._file, [data[done:]], at + done)
            if read == 0:
                raise OSError(f"what client {client} sent cannot be read back from the spill file")
            done += read


def _write(file: int, x: Tensor, at: int) -> None:
    """All of a vector's bytes; a single call writes 2 GB at most."""
    data, done = _bytes(x), 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor, which must stay alive."""
    size = x.numel() * x.itemsize
    return memoryview((ctypes.c_char * size).from_address(x.data_ptr()) if size else b"")
