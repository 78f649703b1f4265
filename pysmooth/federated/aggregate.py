"""aggregate: sums over clients' vectors, by the CPU kernels where they are theirs, else in torch.

Both ways give the same bits, but for the norm's last ones.
"""

from __future__ import annotations

import ctypes
import math
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from .._clip_grad import get_total_norm
from ..engine.backends import available_backends, native_module
from ..reference import aggregate as eager

_ELEMENTS = 1 << 18  # of all clients together that torch sums up at a time, in float64: 2 MB


def _native(*tensors: Tensor) -> types.ModuleType | None:
    """The kernels, for contiguous vectors in float32 or float64."""
    mine = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return native_module() if mine and "cpu" in available_backends() else None


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> float:
    """Writes the sum of weights[c] * vectors[c] into `out`, and returns its norm.

    Equivalent to::

        out.copy_(sum(w * v.double() for w, v in zip(weights, vectors)))
        return float(vector_norm(out))

    with terms added up in pairs, and pairs of pairs. The kernel reads each vector once, and takes
    the norm of what it has just written.

    Args:
        vectors: at least one; all of the size and dtype of `out`, float32 or float64, contiguous.
        weights: as many. That of a vector to be clipped holds the clip: norms are known by then.
        out: contiguous.
    """
    if (native := _native(out, *vectors)) is not None:
        wide = out.dtype == torch.float64
        addresses = [v.data_ptr() for v in vectors]
        threads = torch.get_num_threads()
        squares = native.sum_clients(
            addresses, list(weights), wide, len(out), out.data_ptr(), threads
        )
        norm = math.sqrt(squares)
        return norm if wide else ctypes.c_float(norm).value
    factors = torch.tensor(weights, dtype=torch.float64, device=out.device)
    length = max(1, _ELEMENTS // len(vectors))
    for begin in range(0, len(out), length):
        rows = torch.stack([v[begin : begin + length].to(out.device) for v in vectors])
        out[begin : begin + length].copy_(eager.weighted_sum(rows, factors))
    return float(get_total_norm([out]))


def add_dots(vectors: Sequence[Tensor], other: Tensor, out: Tensor) -> None:
    """Adds the inner product of each vector with another one to `out`, float64, on the CPU.

    Equivalent to::

        out += torch.stack([(v.double() * other.double()).sum() for v in vectors])

    Args:
        vectors: as in `weighted_sum`. To go on from one stretch of vectors to the next, stretches
            must be multiples of 8192 elements: sums are taken by blocks of so many.
        other: of their size and dtype, contiguous.
        out: as many.
    """
    if (native := _native(other, out, *vectors)) is not None:
        native.dot_clients(
            [v.data_ptr() for v in vectors],
            other.dtype == torch.float64,
            len(other),
            other.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return
    at_once = max(1, _ELEMENTS // max(1, len(other)))
    for begin in range(0, len(vectors), at_once):
        rows = torch.stack([v.to(other.device) for v in vectors[begin : begin + at_once]])
        sums = out[begin : begin + at_once].to(other.device, copy=True)
        eager.add_dots(rows, other, sums)
        out[begin : begin + at_once].copy_(sums)
