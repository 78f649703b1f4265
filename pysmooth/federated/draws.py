"""Who and what is drawn: permutations, by the CPU kernels where they are there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.backends import available_backends, native_module
from ..reference import random


def permutation(count: int, size: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """The first `count` elements of a permutation of range(size): `reference.random`'s."""
    if "cpu" not in available_backends():
        return random.permutation(count, size, seed=seed, step=step, tensor_id=tensor_id)
    out = torch.empty(count, dtype=torch.int64)
    place = out.data_ptr()
    native_module().permutation(count, size, seed & (1 << 64) - 1, step, tensor_id, place)
    return out
