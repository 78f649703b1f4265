"""`swap` and `unswap` of optimizers over DTensors: a case for several local processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from battery import same_bits
from sharded import BACKEND, SHAPES, agreed, cut, meshes, values, whole
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

import pysmooth

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

MAKES: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": p[:2]}, {"params": p[2:], "lr": 0.02}]),
}
MAX_NORM = 0.5


def _steps(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    schedule: Any,
    place: Callable[[list[Tensor]], list[Tensor]],
    first: int,
) -> None:
    """Two steps; torch's optimizers get their clip before each."""
    for step in range(first, first + 2):
        grads = [g.double() for g in values(10 + step)]
        for p, g in zip(params, place(grads), strict=True):
            p.grad = g
        if type(optimizer).__module__.startswith("torch."):
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        schedule.step()


def there_and_back() -> None:
    """torch, the fused twin, torch again: as torch on whole tensors."""
    for layout in ("fsdp", "2d"):
        mesh, placed = meshes()[layout]
        for name, make in MAKES.items():
            place = partial(cut, mesh=mesh, placed=placed, every=len(SHAPES) + 1)
            start = [p.double() for p in values(1)]
            ours = [p.requires_grad_() for p in place(start)]
            alone = [p.clone().requires_grad_() for p in start]
            optimizer, reference = make(ours), make(alone)
            schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
            follows = lr_scheduler.ExponentialLR(reference, 0.9)
            _steps(optimizer, ours, schedule, place, 0)
            held = _held(optimizer)
            twin = pysmooth.swap(optimizer, max_norm=MAX_NORM)
            _as_it_was(twin, held)
            _steps(twin, ours, schedule, place, 2)
            assert twin.resolved_backend == BACKEND
            norm = twin.last_norm()
            assert norm is not None
            assert agreed(norm)
            held = _held(twin)
            back = pysmooth.unswap(twin, drop=["clip"])
            assert type(back) is type(reference)
            _as_it_was(back, held)
            _steps(back, ours, schedule, place, 4)
            for first in (0, 2, 4):
                _steps(reference, alone, follows, list, first)
            for p, q in zip(ours, alone, strict=True):
                error = float((whole(p.detach()) - q.detach()).abs().max())
                assert error <= 1e-12, (layout, name, error)


def _held(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: dict(state) for p, state in optimizer.state.items()}


def _as_it_was(optimizer: torch.optim.Optimizer, held: dict[Tensor, dict[str, Any]]) -> None:
    """The states that were handed over: every process's part, in its place."""
    assert optimizer.state.keys() == held.keys()
    for p, state in optimizer.state.items():
        assert state.keys() == held[p].keys()
        for key, value in state.items():
            old = held[p][key]
            assert isinstance(value, DTensor) == isinstance(old, DTensor), key
            if isinstance(value, DTensor):
                assert value.placements == old.placements
                assert same_bits(value.to_local(), old.to_local()), key
            elif isinstance(value, Tensor):
                assert float(value) == float(old) if key == "step" else same_bits(value, old), key
