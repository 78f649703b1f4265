"""No memory for states: a step or a load then changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from battery import (
    advance,
    all_params,
    assert_unchanged,
    continues_alike,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from registry import Entry
from torch import Tensor

from pysmooth.engine import state as state_module

SHAPES = ((5, 3), (), (0, 2), (33,))


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Memory for so many allocations of states; -1: enough."""
    left = [-1]

    def meter(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if left[0] == 0:
                raise RuntimeError("not enough memory: you tried to allocate")
            left[0] -= left[0] > 0
            return make(*args, **kwargs)

        return made

    class Torch:
        empty, zeros = staticmethod(meter(torch.empty)), staticmethod(meter(torch.zeros))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(state_module, "torch", Torch())
    yield left
    left[0] = -1


@every_backend
@every_entry
def test_out_of_memory_for_states(entry: Entry, backend: str, scarce: list[int]) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 2)
    optimizer, other = entry.build(params, backend), entry.build(make_params(SHAPES), backend)
    before = snapshot(optimizer)
    set_grads(params, rows[0])
    failed = 0
    for scarce[0] in range(40):
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "memory" in str(error)  # noqa: PT017
            failed += 1
            assert_unchanged(optimizer, before)
            continue
        break
    assert failed > 0 or not entry.state_keys(entry.main)
    scarce[0] = -1
    advance(other, all_params(other), rows[:1])
    continues_alike(optimizer, other, rows[1:])


@every_backend
@every_entry
def test_out_of_memory_in_a_load(entry: Entry, backend: str, scarce: list[int]) -> None:
    params = make_params(SHAPES)
    optimizer = entry.build(params, backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    saved = copy.deepcopy(optimizer.state_dict())
    advance(optimizer, params, rows[1:])
    before = snapshot(optimizer)
    if not any(before[1]):
        pytest.skip("no states")
    scarce[0] = 0
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
