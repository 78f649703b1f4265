"""Bandwidth probes: the least time that a pass over given streams can take on this CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import native_module


def mix(rw: list[Tensor], r: list[Tensor]) -> None:
    """One pass that reads and writes each tensor of `rw` and reads each of `r`.

    Tensors are contiguous, one-dimensional, float32, of one size; at most 3 in `rw` and 2 in `r`.
    The elements of `rw` change by about 1e-30 of the others' sum.
    """
    native_module().probe_mix(rw, r, torch.get_num_threads())


def copy(dst: Tensor, src: Tensor) -> None:
    """Copies `src` to `dst`, both contiguous, one-dimensional, float32."""
    native_module().probe_copy(dst, src, torch.get_num_threads())


def isa() -> str:
    """The instruction-set level that the kernels run at: baseline, avx2 or avx512."""
    return str(native_module().isa())
