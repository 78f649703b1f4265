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

_ELEMENTS = 1 << 18  # of all clients together that are summed up at a time, in float64: 2 MB


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
    vectors at a time.

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
        self._whole: dict[int, Tensor] = {}
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
            UploadError: the wrong number of vectors, a wrong shape or dtype, a number that is not
                finite, samples less than 1, or a second answer. Nothing was taken.
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
            if v.dtype != self.dtype:
                raise UploadError("dtype", f"client {client} sent {v.dtype}, not {self.dtype}")
        norms = tuple(float(get_total_norm([v])) for v in vectors)
        if not all(math.isfinite(norm) for norm in norms):
            raise UploadError("nonfinite", f"client {client} sent numbers that are not finite")
        if self._file is None:
            self._held[client] = tuple(v.detach() for v in vectors)
        else:
            self._slots[client] = len(self._slots)
            for part, v in enumerate(vectors):
                _write(self._file, v.detach().cpu(), self._offset(client, part, 0))
        self._whole.clear()
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
        out = torch.empty(self.size, dtype=self.dtype) if out is None else out
        # Products and sums are rounded each: one instruction for both would depend on the CPU.
        weights = torch.tensor([factors[c] for c in order], dtype=torch.float64).unsqueeze(1)
        for begin, rows in self._rows(order, part):
            total = tree_sum(rows * weights.to(rows.device))
            out[begin : begin + len(total)].copy_(total)
        return out, float(get_total_norm([out]))

    def dots(self, vector: Tensor, part: int = 0) -> Tensor:
        """The inner products of `vector` with the clients' vectors, in the order of `clients`."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for begin, rows in self._rows(self.clients, part):
            other = vector[begin : begin + rows.shape[1]].to(rows.device, torch.float64)
            total += tree_sum((rows * other).T).cpu()
        return total

    def _rows(self, order: list[int], part: int) -> Iterator[tuple[int, Tensor]]:
        """Stretches of the vectors, in float64: where they begin, and a row for each client."""
        if not order:
            raise ValueError("no client is left to take a sum over")
        length = max(1, min(self.size, _ELEMENTS // len(order)))
        if length == self.size and order == self.clients:
            if part not in self._whole:  # small: methods that weigh clients ask again and again
                self._whole[part] = self._stack(order, part, 0, length)
            yield 0, self._whole[part]
            return
        for begin in range(0, self.size, length):
            yield begin, self._stack(order, part, begin, min(length, self.size - begin))

    def _stack(self, order: list[int], part: int, begin: int, length: int) -> Tensor:
        first = self._block(order[0], part, begin, length)
        rows = torch.empty(len(order), length, dtype=torch.float64, device=first.device)
        for row, client in zip(rows, order, strict=True):
            row.copy_(self._block(client, part, begin, length))
        return rows

    def _offset(self, client: int, part: int, begin: int) -> int:
        vectors = self._slots[client] * self.parts + part
        return (vectors * self.size + begin) * self.dtype.itemsize

    def _block(self, client: int, part: int, begin: int, length: int) -> Tensor:
        if self._file is None:
            return self._held[client][part][begin : begin + length]
        data = bytearray(length * self.dtype.itemsize)
        read = os.preadv(self._file, [data], self._offset(client, part, begin))
        if read != len(data):
            raise OSError(f"what client {client} sent cannot be read back from the spill file")
        return torch.frombuffer(data, dtype=self.dtype)


def tree_sum(x: Tensor) -> Tensor:
    """The sum over the first dimension: one half is added to the other until one is left.

    The order of additions is that of the definition on every machine, torch.sum's is not.
    """
    while (n := len(x)) > 1:
        half = n // 2
        folded = x[:half] + x[half : 2 * half]
        x = folded if n % 2 == 0 else torch.cat([folded, x[-1:]])
    return x[0] if len(x) else x.sum(0)


def _write(file: int, x: Tensor, at: int) -> None:
    """All of a vector's bytes; a single call writes 2 GB at most."""
    x = x.contiguous()
    size = x.numel() * x.itemsize
    data = memoryview((ctypes.c_char * size).from_address(x.data_ptr())) if size else b""
    done = 0
    while done < size:
        done += os.pwrite(file, data[done:], at + done)
