"""Norms of gradients that are DTensors, for `pysmooth.clip_grad_norm_`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..engine.recipe import Scope
from ..optim._managed import part_here
from .exchange import (
    COUNT_NONZERO,
    MAX_ABS,
    MIN_ABS,
    SUM_ABS,
    SUM_POWER,
    SUM_SQUARES,
    Exchange,
    layout_of,
)

_KINDS = {2.0: SUM_SQUARES, 1.0: SUM_ABS, 0.0: COUNT_NONZERO, math.inf: MAX_ABS, -math.inf: MIN_ABS}


def spread(tensors: Sequence[Tensor], process_group: Any) -> bool:
    """Whether a norm of these takes other processes."""
    from .sharded_view import is_dtensor

    return process_group is not None or any(map(is_dtensor, tensors))


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What is here of each."""
    return [part_here(t) for t in tensors]


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], norm_type: float, process_group: Any) -> Tensor:
    """The norm of whole tensors, each counted once, on every process the same bits."""
    labels = [f"gradient {i}" for i in range(len(tensors))]
    layouts = [layout_of(t, label) for t, label in zip(tensors, labels, strict=True)]
    kind = _KINDS.get(norm_type, SUM_POWER)
    exchange = Exchange(layouts, labels, process_group)
    neutral = math.inf if kind == MIN_ABS else 0.0
    parts = local_parts(tensors)
    sums = [_power(t, norm_type, kind) if t.numel() else neutral for t in parts]
    sums, _ = exchange.tensors(kind, sums, [0.0] * len(sums))
    if kind == COUNT_NONZERO:  # torch's: how many of the tensors' norms are not zero
        sums = [float(s != 0) for s in sums]
    if kind in (MAX_ABS, MIN_ABS):
        pick = max if kind == MAX_ABS else min
        total = math.nan if any(map(math.isnan, sums)) else pick(sums, default=neutral)
    else:
        total = math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
    (total,), _ = exchange.units(kind, Scope.GLOBAL, [total], 0.0)
    if kind in (SUM_SQUARES, SUM_POWER):
        total = total ** (1 / norm_type)
    dtype = reference.clip.norm_dtype(parts)
    return torch.tensor(0.0 if total == neutral else total, dtype=dtype, device=exchange.device)


def _power(t: Tensor, norm_type: float, kind: int) -> float:
    from .._clip_grad import get_total_norm

    if t.is_complex() and kind != SUM_SQUARES:
        return float(torch.linalg.vector_norm(t, norm_type)) ** (
            norm_type if kind == SUM_POWER else 1
        )
    norm = float(get_total_norm([t.double()] if kind == SUM_POWER else [t], norm_type))
    return norm**norm_type if kind in (SUM_SQUARES, SUM_POWER) else norm
