"""Refuses what a step could not do right, before it touches anything: the eager engine's checks.

The native backend makes the same ones in csrc/bindings, with the same messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .state import state_dtype

Labelled = tuple[str, Tensor]


def check_gradient(p: Tensor, label: str) -> None:
    """The gradient is dense and has the parameter's shape."""
    grad = p.grad
    if grad is None:
        return
    if grad.layout is not torch.strided:
        raise ValueError(
            f"gradient of parameter {label!r} has layout {grad.layout}; only dense "
            "(torch.strided) tensors are supported"
        )
    if grad.shape != p.shape:
        raise ValueError(f"gradient of parameter {label!r} does not have the parameter's shape")


def check_state(p: Tensor, label: str, key: str, state: Any) -> None:
    """The state is a tensor of the parameter's shape, in the precision that states are kept in."""
    name = f"state {key!r} of parameter {label!r}"
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} is not a tensor but {type(state)}")
    if state.shape != p.shape:
        raise ValueError(f"{name} does not have the parameter's shape")
    if state.dtype != state_dtype(p):
        raise ValueError(f"{name} has dtype {state.dtype}, expected {state_dtype(p)}")


def check_memory(written: Sequence[Labelled]) -> None:
    """No element of the tensors that a step writes shares memory with another one."""
    storages: dict[int, list[Labelled]] = {}
    for label, t in written:
        if t.numel() > 0 and t.device.type != "meta":
            storages.setdefault(t.untyped_storage().data_ptr(), []).append((label, t))
    for members in storages.values():
        if len(members) > 1 or not _dense(members[0][1]):
            _check_storage(members)


def _dense(t: Tensor) -> bool:
    """Sufficient for a tensor not to overlap itself: it fills a block, in some order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_storage(members: list[Labelled]) -> None:
    """Notes, unit by unit, whose element lies on the memory that these tensors share."""
    unit = min(t.itemsize for _, t in members)
    units = members[0][1].untyped_storage().nbytes() // unit
    owner = torch.full((units,), -1, dtype=torch.int32)
    numbers = torch.arange(units)
    for number, (label, t) in enumerate(members):
        width = t.itemsize // unit
        strides = (*(s * width for s in t.stride()), 1)
        cells = numbers.as_strided((*t.shape, width), strides, t.storage_offset() * width)
        cells = cells.reshape(-1)
        if len(torch.unique(cells)) < len(cells):
            raise ValueError(f"{label} overlaps itself in memory (an expanded tensor?)")
        other = int(owner[cells].max())
        if other >= 0:
            raise ValueError(f"{members[other][0]} and {label} share memory")
        owner[cells] = number
