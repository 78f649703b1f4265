"""Autograd, leaks, and tensors that move, for every optimizer of the registry."""

from __future__ import annotations

import copy
import gc
import tracemalloc

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    assert_same_snapshot,
    continues_alike,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    same_bits,
    snapshot,
)
from registry import Entry
from torch import Tensor

# ---- autograd and torch.compile -----------------------------------------------------------------


@every_backend
@every_entry
def test_autograd_notices_the_update(entry: Entry, backend: str) -> None:
    params = make_params([(4,), (3, 3)])
    optimizer = entry.build(params, backend)
    for _ in range(2):  # the first step, which allocates states, and one that reuses them
        versions = [p._version for p in params]
        losses = [(p**2).sum() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@every_backend
@every_entry
def test_autograd_notices_that_states_changed(entry: Entry, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = entry.build([p], backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for key in entry.state_keys(entry.main):
        version = optimizer.state[p][key]._version
        optimizer.step()
        assert optimizer.state[p][key]._version > version


@every_backend
@every_entry
def test_compiled_training_step(entry: Entry, backend: str) -> None:
    """Graph breaks are allowed; other numbers are not."""

    def train(compiled: bool) -> list[Tensor]:
        params = make_params([(6, 4), (6,)])
        optimizer = entry.build(params, backend)

        def body(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = torch.tanh(x @ params[0].T + params[1]).sum()
            value = loss.detach()
            loss.backward()
            optimizer.step()
            return value

        fn = torch.compile(body, backend="eager") if compiled else body
        gen = torch.Generator().manual_seed(5)
        losses = [fn(torch.randn(3, 4, generator=gen)) for _ in range(4)]
        return [*losses, *params]

    torch.compiler.reset()
    assert_same_bits(train(compiled=True), train(compiled=False))


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.many_steps
@every_backend
@every_entry
def test_no_leak_over_many_steps(entry: Entry, backend: str) -> None:
    params = make_params([(3,), (2, 2)])
    optimizer = entry.build(params, backend)
    rows = record_grads(params, 1)
    steps = 3_000 if backend == "cpu" else 1_500  # the eager steps are plain torch, and slow
    advance(optimizer, params, rows * 100)
    gc.collect()
    objects = len(gc.get_objects())
    growth: list[int] = []
    tracemalloc.start()
    try:
        advance(optimizer, params, rows * (steps // 5))
        # A leak grows in every stretch; the interpreter's free lists, once.
        while len(growth) < 3 and (not growth or growth[-1] >= 32 * 1024):
            gc.collect()
            early, _ = tracemalloc.get_traced_memory()
            advance(optimizer, params, rows * steps)
            gc.collect()
            late, _ = tracemalloc.get_traced_memory()
            growth.append(late - early)
    finally:
        tracemalloc.stop()
    assert abs(len(gc.get_objects()) - objects) < 200  # less than one in nine steps
    assert growth[-1] < 32 * 1024  # not one small object per step


@pytest.mark.many_steps
@every_backend
@every_entry
def test_native_memory_does_not_grow(entry: Entry, backend: str) -> None:
    """Gradients of a megabyte, new in each step: one kept alive in five would be seen."""
    import resource

    params = make_params([(512, 512)])
    optimizer = entry.build(params, backend)

    def steps(n: int) -> int:
        for _ in range(n):
            params[0].grad = torch.full_like(params[0], 0.01)
            optimizer.step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    early = steps(10)
    assert steps(200) - early < 40 * 1024  # KiB


# ---- things moved under the optimizer's feet ----------------------------------------------------


@every_backend
@every_entry
def test_parameter_replaced_in_its_group(entry: Entry, backend: str) -> None:
    params, expected = make_params([(5,), (7,)]), make_params([(5,), (7,)])
    rows = record_grads(params, 4)
    optimizer = entry.build(entry.apart(params), backend, **entry.tensors)
    advance(optimizer, params, rows[:2])
    old = params[0].detach().clone()
    new = torch.nn.Parameter(torch.linspace(0, 1, 5))
    replaced, optimizer.param_groups[0]["params"][0] = params[0], new
    advance(optimizer, [new, params[1]], rows[2:])

    assert same_bits(replaced, old)
    fresh = torch.nn.Parameter(torch.linspace(0, 1, 5))
    advance(entry.build([fresh], backend, **entry.tensors), [fresh], [row[:1] for row in rows[2:]])
    advance(
        entry.build(expected[1:], backend, **entry.tensors), expected[1:], [r[1:] for r in rows]
    )
    assert_same_bits([new, params[1]], [fresh, expected[1]])


@every_backend
@every_entry
@pytest.mark.parametrize("change", ["append", "delete"])
def test_list_of_parameters_changed_in_its_group(entry: Entry, backend: str, change: str) -> None:
    """torch never stops anyone from editing group["params"]."""
    params, expected = make_params([(5,), (7,), (3,)]), make_params([(5,), (7,), (3,)])
    rows = record_grads(params, 4)
    before, after = (2, 3) if change == "append" else (3, 2)
    groups = entry.apart(params[:before])
    if isinstance(groups[0], dict) and change == "append":
        groups.append({"params": []})
    optimizer = entry.build(groups, backend, **entry.tensors)
    advance(optimizer, params[:before], [row[:before] for row in rows[:2]])
    edited = optimizer.param_groups[-1]["params"]
    if change == "append":
        edited.append(params[2])
    else:
        del edited[-1]
    advance(optimizer, params[:after], [row[:after] for row in rows[2:]])

    for i, p in enumerate(expected):
        own = [[row[i]] for s, row in enumerate(rows) if i < (before if s < 2 else after)]
        advance(entry.build([p], backend, **entry.tensors), [p], own)
    assert_same_bits(params, expected)


@every_backend
@every_entry
def test_moved_storage(entry: Entry, backend: str) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:2])
    old = [p.data for p in params]
    kept = [t.clone() for t in old]
    for p in params:
        p.data = p.data.clone()
    advance(optimizer, params, rows[2:])
    advance(entry.build(expected, backend), expected, rows)
    assert_same_bits(params, expected)
    assert_same_bits(old, kept)  # nothing was written to the memory left behind


@every_backend
@every_entry
def test_states_replaced_by_the_user(entry: Entry, backend: str) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    advance(optimizer, params, rows[:2])
    advance(plain, expected, rows[:2])
    old = []
    for p, q in zip(params, expected, strict=True):
        for key in entry.state_keys(entry.main):
            old.append(optimizer.state[p][key])
            optimizer.state[p][key] = torch.full_like(p, 0.25).detach()
            plain.state[q][key].fill_(0.25)
    kept = [t.clone() for t in old]
    advance(optimizer, params, rows[2:])
    advance(plain, expected, rows[2:])
    assert_same_snapshot(snapshot(optimizer), snapshot(plain))
    assert_same_bits(old, kept)


@every_backend
@every_entry
def test_dicts_of_states_replaced_by_the_user(entry: Entry, backend: str) -> None:
    """As an offloader does: equal states in another dict, and nothing may write to the old ones."""
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    advance(optimizer, params, rows[:2])
    advance(plain, expected, rows[:2])
    old = [dict(optimizer.state[p]) for p in params]
    kept = copy.deepcopy(old)
    for p, held in zip(params, kept, strict=True):
        optimizer.state[p] = copy.deepcopy(held)
    advance(optimizer, params, rows[2:])
    advance(plain, expected, rows[2:])
    assert_same_snapshot(snapshot(optimizer), snapshot(plain))
    for before, after in zip(kept, old, strict=True):
        for key, value in before.items():
            assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key


@every_backend
@every_entry
def test_states_cleared_by_the_user_start_afresh(entry: Entry, backend: str) -> None:
    params = make_params()
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:2])
    optimizer.state.clear()
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    continues_alike(optimizer, entry.build(fresh, backend), rows[2:])
