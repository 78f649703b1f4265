"""State memory: which dtype a state has, and how it is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recipe import (
    COMPENSATION,
    GRADIENT,
    MASTER,
    PARAMETER,
    SCALARS,
    SIXTEEN_BITS,
    STEP,
    Recipe,
)


def state_dtype(param: Tensor, *, low: bool = False) -> torch.dtype:
    """float32 for 16-bit parameters (a bfloat16 sum of ones stops at 256), else the parameter's.

    `low`: bfloat16, for states that are rounded stochastically.
    """
    if low:
        return torch.bfloat16
    if param.dtype in SIXTEEN_BITS:
        return torch.float32
    return param.dtype


def kept_dtype(param: Tensor, key: str, recipe: Recipe) -> torch.dtype:
    """The dtype of one of the recipe's state tensors."""
    if key in (MASTER, COMPENSATION):
        return torch.float32 if key == MASTER else param.dtype
    return state_dtype(param, low=key in recipe.low_states)


def empty_states(owners: Sequence[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
    """Uninitialised states of some dtype: a parameter's shape, its strides where they are dense.

    States of one dtype and device are views of one allocation, each starting on a cache line. One
    allocation is faulted in faster than many, and its views share a version counter, so telling
    autograd of a write costs one call for all of them.
    """
    states: list[Tensor | None] = [None] * len(owners)
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, (p, kind) in enumerate(owners):
        kinds.setdefault((kind, p.device), []).append(i)
    for (dtype, device), members in kinds.items():
        line = max(1, 64 // dtype.itemsize)
        sizes = [-(-owners[i][0].numel() // line) * line for i in members]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        offset = 0
        for i, size in zip(members, sizes, strict=True):
            p = owners[i][0]
            states[i] = flat.as_strided(p.shape, _dense_strides(p), offset)
            offset += size
    return [s for s in states if s is not None]


def _dense_strides(param: Tensor) -> Sequence[int]:
    """The strides that torch would give a copy of the parameter that preserves its format."""
    if param.is_contiguous():
        return param.stride()
    return torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()


def version_roots(states: Sequence[Tensor]) -> list[Tensor]:
    """The fewest tensors whose version counters are those of all the states."""
    roots = [s if s._base is None else s._base for s in states]
    return list({id(root): root for root in roots}.values())


def zero_scalars(key: str, params: Sequence[Tensor]) -> list[Tensor]:
    """States of one number, 0, one per parameter, views of one allocation.

    Step counts are on the CPU, as torch's optimizers keep them; others beside their parameter.
    """
    places = [torch.device("cpu") if key == STEP else p.device for p in params]
    numbers = {
        place: iter(torch.zeros(places.count(place), dtype=SCALARS[key], device=place).unbind())
        for place in dict.fromkeys(places)
    }
    return [next(numbers[place]) for place in places]


def new_states(owners: Sequence[tuple[Tensor, str, Recipe]]) -> list[Tensor]:
    """Uninitialised states, and numbers that are 0, for parameters and keys of their recipes."""
    made = {key: iter(zero_scalars(key, [p for p, k, _ in owners if k == key])) for key in SCALARS}
    kinds = [(p, kept_dtype(p, key, recipe)) for p, key, recipe in owners if key not in SCALARS]
    states = iter(empty_states(kinds))
    return [next(made.get(key, states)) for _, key, _ in owners]


def fill_state(state: Tensor, value: float | str, param: Tensor, grad_factor: float) -> None:
    """Fills a new state: a number, `PARAMETER` or, for `GRADIENT`, what will be descended along."""
    if value == PARAMETER:
        state.copy_(param)
    elif value != GRADIENT:
        state.fill_(float(value))
    elif param.grad is not None:
        state.copy_(param.grad).mul_(grad_factor)
        parts = torch.view_as_real(state) if state.is_complex() else state
        parts.nan_to_num_(0.0, 0.0, 0.0)  # as the policy "zero" reads them; others drop the step
