"""What the Triton backend launches, compiles and sends in the steps of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import advance, every_unwaiting_entry, make_params, record_grads, set_grads
from registry import Entry
from torch import Tensor

import pysmooth
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels.launch import Launch

from pysmooth.engine.triton import TritonEngine


class Recorded:
    """Stands in for launches: nothing runs, but what was to be compiled is known."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.compiled: set[tuple[Any, ...]] = set()

    def __call__(self, launch: Launch, _: int | None, values: tuple[int, ...] = ()) -> None:
        kinds = tuple(
            (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else type(a)
            for a in launch.arguments
        )
        self.kernels.append(launch.spec.kernel.__name__)
        self.compiled.add((launch.spec, kinds, len(values)))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    record = Recorded()
    monkeypatch.setattr(Launch, "__call__", lambda *given: record(*given))
    return record


@pytest.mark.parametrize("count", [1, 300])
def test_a_step_is_three_launches_whatever_the_number_of_tensors(
    recorded: Recorded, count: int
) -> None:
    params = make_params([(3,)] * count)
    optimizer = pysmooth.Adam(params, max_norm=1.0, backend="triton")
    advance(optimizer, params, record_grads(params, 1))
    assert recorded.kernels == ["reduce", "finalize", "apply"]


@every_unwaiting_entry  # what the host asks the device for is not there: nothing runs
def test_a_schedule_never_compiles_again(entry: Entry, recorded: Recorded) -> None:
    """100 steps of every method, all that moves in training moving: the first one compiles all."""
    params = make_params([(33,), (5, 7), ()])
    optimizer = entry.make(params, backend="triton", **entry.main)
    (group,) = optimizer.param_groups
    moving = [key for key in ("lr", "weight_decay") if group.get(key)]
    start = {key: float(group[key]) for key in moving}
    rows = record_grads(params, 4)
    first: set[tuple[Any, ...]] = set()
    for i in range(100):
        for key in moving:
            group[key] = start[key] / (1 + i)
        set_grads(params, rows[i % 4])
        if i % 7 == 3:
            params[1].grad = None
        optimizer.step()
        first = first or set(recorded.compiled)
    assert recorded.compiled == first
    assert first
    tables = [kind for _, kinds, _ in first for kind in kinds if isinstance(kind, tuple)]
    assert all(misaligned == 0 for _, misaligned in tables)


def test_a_hook_never_compiles_again(recorded: Recorded) -> None:
    """Where gradients are absorbed, a tensor has launches of its own: they share kernels."""
    params = make_params([(33,), (7,), (5, 7)])
    optimizer = pysmooth.EFSGD(
        params, 0.1, pysmooth.TopK(k=3), weight_decay=0.1, absorb=True, backend="triton"
    )
    first: set[tuple[Any, ...]] = set()
    for i in range(100):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
        torch.stack([(i + 1) * p.sum() for p in params]).sum().backward()
        optimizer.step()
        first = first or set(recorded.compiled)
    assert recorded.compiled == first
    names = {spec.kernel.__name__ for spec, *_ in first}
    assert {"look", "admit", "source", "begin_absorbed", "finalize", "select_block"} == names
    assert len(first) == len(names)  # short tensors are selected from without a pass


def test_unchanged_addresses_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    optimizer = pysmooth.ClipSGD(params, 0.1, max_norm=1.0, backend="triton")
    set_grads(params, record_grads(params, 1)[0])
    optimizer.step()
    engine = optimizer._engine
    assert isinstance(engine, TritonEngine)
    assert engine._plan is not None
    sent = engine._plan.words.sent
    optimizer.step()
    assert engine._plan.words.sent is sent
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert engine._plan.words.sent is not sent
