"""Broken checkpoints give clear errors, and change nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_unchanged,
    continues_alike,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    snapshot,
)
from registry import Entry

import pysmooth

SHAPES = ((5, 3), (), (0, 2), (33,))


def drop(saved: Any, *path: Any) -> None:
    for key in path[:-1]:
        saved = saved[key]
    del saved[path[-1]]


def put(value: Any, saved: Any, *path: Any) -> None:
    for key in path[:-1]:
        saved = saved[key]
    saved[path[-1]] = value


BROKEN: dict[str, Callable[[Any], None]] = {
    "no state": lambda saved: drop(saved, "state"),
    "no groups": lambda saved: drop(saved, "param_groups"),
    "no params": lambda saved: drop(saved, "param_groups", 0, "params"),
    "groups of nothing": lambda saved: put([None], saved, "param_groups"),
    "groups of tensors": lambda saved: put(torch.zeros(2, 2), saved, "param_groups"),
    "params of names": lambda saved: put(["a", "b", "c", "d"], saved, "param_groups", 0, "params"),
    "a parameter twice": lambda saved: put(0, saved, "param_groups", 0, "params", 1),
    "state of nothing": lambda saved: put(None, saved, "state", 0),
    "lr of nothing": lambda saved: put(None, saved, "param_groups", 0, "lr"),
    "lr of NaN": lambda saved: put(float("nan"), saved, "param_groups", 0, "lr"),
}


@every_backend
@every_entry
@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoint_is_refused_whole(entry: Entry, backend: str, how: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    if how.startswith("lr") and "lr" not in optimizer.param_groups[0]:
        pytest.skip("this optimizer has no lr to spoil")
    advance(optimizer, params, rows[:2])
    other = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    if how in ("state of nothing", "params of names") and not saved["state"]:
        pytest.skip("this optimizer has no states to spoil")
    BROKEN[how](saved)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(saved)
    continues_alike(optimizer, other, rows[2:])


@every_backend
@every_entry
@pytest.mark.parametrize("count", [float("nan"), -1.0, float("inf"), torch.tensor(float("nan"))])
def test_step_counts_that_count_nothing(entry: Entry, backend: str, count: Any) -> None:
    params = make_params(SHAPES)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, record_grads(params, 1))
    saved = copy.deepcopy(optimizer.state_dict())
    if "step" not in saved["state"].get(0, {}):
        pytest.skip("this optimizer counts no steps")
    saved["state"][0]["step"] = count
    with pytest.raises(ValueError, match=r"step.*not a count of steps"):
        optimizer.load_state_dict(saved)


def test_truncated_files_are_refused_by_torch_before_anything_changes() -> None:
    """pysmooth opens no files: what torch.load makes of one is all that it sees."""
    params = make_params(SHAPES)
    optimizer = pysmooth.Adam(params, lr=0.1)
    advance(optimizer, params, record_grads(params, 1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    before = snapshot(optimizer)
    size = len(file.getvalue())
    for cut in range(0, size, size // 7):
        with pytest.raises((RuntimeError, EOFError)):
            torch.load(io.BytesIO(file.getvalue()[:cut]), weights_only=True)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("norm", ["in_step", "in_backward"])
def test_checkpoint_of_a_torch_twin_lacks_what_torch_lacks(norm: Any) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 2)
    twin = torch.optim.AdamW(params, lr=0.5)
    advance(twin, params, rows[:1])
    saved = twin.state_dict()
    for key in ("decoupled_weight_decay", "lr"):
        saved["param_groups"][0].pop(key, None)
    mine = make_params(SHAPES)
    optimizer = pysmooth.AdamW(mine, lr=0.25, max_norm=1.0, norm=norm)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    advance(optimizer, mine, rows[1:])


@every_backend
def test_a_checkpoint_of_no_step_is_one(backend: str) -> None:
    """torch's Adagrad has states, and counts 0, before its first step."""
    params, twins = make_params(SHAPES), make_params(SHAPES)
    rows = record_grads(params, 2)
    theirs = torch.optim.Adagrad(twins, lr=0.5, lr_decay=0.1)
    saved = theirs.state_dict()
    assert float(saved["state"][0]["step"]) == 0.0
    optimizer = pysmooth.Adagrad(params, lr=0.5, lr_decay=0.1, backend=backend)
    optimizer.load_state_dict(saved)
    for row in rows:
        advance(optimizer, params, [row])
        advance(theirs, twins, [row])
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
