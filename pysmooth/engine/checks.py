"""Refuses what a step could not do right, before it touches anything: the eager engine's checks.

The native backend makes the same ones in csrc/bindings, with the same messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .recipe import SCALARS, Recipe
from .state import kept_dtype

Labelled = tuple[str, Tensor]


def check_layout(t: Tensor, name: str) -> None:
    """The tensor is an ordinary one, with strides."""
    if t.layout is not torch.strided:
        raise ValueError(
            f"{name} has layout {t.layout}; only dense (torch.strided) tensors are supported"
        )


def check_gradient(p: Tensor, label: str) -> None:
    """The gradient is dense and has the parameter's shape."""
    grad = p.grad
    if grad is None:
        return
    check_layout(grad, f"gradient of parameter {label!r}")
    if grad.shape != p.shape:
        raise ValueError(f"gradient of parameter {label!r} does not have the parameter's shape")


def check_state(p: Tensor, label: str, key: str, state: Any, recipe: Recipe) -> None:
    """The state is a tensor of the parameter's shape, in the precision that states are kept in."""
    name = f"state {key!r} of parameter {label!r}"
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} is not a tensor but {type(state)}")
    if key in SCALARS:
        if state.dtype != SCALARS[key] or state.shape != ():
            kind = str(SCALARS[key]).removeprefix("torch.")
            raise ValueError(f"{name} is not a {kind} tensor of shape ()")
        return
    if state.shape != p.shape:
        raise ValueError(f"{name} does not have the parameter's shape")
    expected = kept_dtype(p, key, recipe)
    if state.dtype != expected:
        raise ValueError(f"{name} has dtype {state.dtype}, expected {expected}")


ITSELF = "{} overlaps itself in memory (an expanded tensor?)"
SHARED = "{} and {} share memory"


def check_memory(
    written: Sequence[Labelled], *, itself: str = ITSELF, shared: str = SHARED
) -> None:
    """No element of the tensors that are written shares memory with another one.

    Blocks of one storage (the buckets of DDP, flat states) cost a comparison of their ends; only
    tensors whose spans meet, or that leave gaps, are looked at element by element.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}  # per storage: begin, end, number
    for number, (_, t) in enumerate(written):
        if t.numel() > 0 and t.device.type != "meta":
            begin, end = _span(t)
            spans.setdefault(t.untyped_storage().data_ptr(), []).append((begin, end, number))
    for members in spans.values():
        members.sort()
        cluster: list[int] = []
        reach = -1
        for begin, end, number in [*members, (1 << 62, 1 << 62, -1)]:
            if begin >= reach and cluster:
                _check_cluster([written[i] for i in sorted(cluster)], itself, shared)
                cluster = []
            cluster.append(number)
            reach = max(reach, end)


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and byte past the last one, within the storage."""
    last = sum((int(n) - 1) * int(s) for n, s in zip(t.shape, t.stride(), strict=True))
    begin = int(t.storage_offset()) * t.itemsize
    return begin, begin + (last + 1) * t.itemsize


def _check_cluster(members: list[Labelled], itself: str, shared: str) -> None:
    begin = min(_span(t)[0] for _, t in members)
    end = max(_span(t)[1] for _, t in members)
    if len(members) == 1 and end - begin == members[0][1].numel() * members[0][1].itemsize:
        strides = sorted(
            (s, n)
            for s, n in zip(members[0][1].stride(), members[0][1].shape, strict=True)
            if n > 1
        )
        if _nested(strides):
            return  # one block without gaps
    unit = min(t.itemsize for _, t in members)
    numbers = torch.arange((end - begin) // unit, device="cpu")
    owner = torch.full_like(numbers, -1)
    for number, (label, t) in enumerate(members):
        width = t.itemsize // unit
        strides_ = (*(s * width for s in t.stride()), 1)
        cells = numbers.as_strided((*t.shape, width), strides_, (_span(t)[0] - begin) // unit)
        cells = cells.reshape(-1)
        if len(torch.unique(cells)) < len(cells):
            raise ValueError(itself.format(label))
        other = int(owner[cells].max())
        if other >= 0:
            raise ValueError(shared.format(members[other][0], label))
        owner[cells] = number


def _nested(strides: list[tuple[int, int]]) -> bool:
    """Whether each dimension, smallest stride first, steps over all that the ones before span."""
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True
