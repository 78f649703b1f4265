"""Ctrl-C, and exceptions of closures and hooks: a step happens whole or not at all."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from battery import (
    Snapshot,
    advance,
    all_params,
    assert_unchanged,
    continues_alike,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
)
from registry import REGISTRY, Entry
from torch import Tensor

SHAPES = ((5, 3), (), (0, 2), (33,))


def equal(a: Snapshot, b: Snapshot) -> bool:
    try:
        for x, y in zip(a[0], b[0], strict=True):
            assert same_bits(x, y)
        for s, t in zip(a[1], b[1], strict=True):
            assert s.keys() == t.keys()
            for key, value in s.items():
                same = same_bits(value, t[key]) if isinstance(value, Tensor) else value == t[key]
                assert same
    except AssertionError:
        return False
    return True


def interrupt_at(line: int, run: Callable[[], Any]) -> bool:
    """Runs, with Ctrl-C pressed at the n-th line of pysmooth's code; whether it came to that."""
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if "/pysmooth/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.many_steps
@pytest.mark.parametrize("started", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", ["clip_sgd", "m_adagrad_norm", "ef_sgd"])
def test_interrupt_on_any_line_of_a_step(name: str, started: bool) -> None:
    """Nothing of the step happened, or all of it; then training goes on as if nothing had been."""
    entry = next(e for e in REGISTRY if e.name == name)
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    origin = entry.build(params, "cpu")
    advance(origin, params, rows[:1] if started else [])
    whole = copy.deepcopy(origin)
    advance(whole, all_params(whole), rows[1:2])
    want = snapshot(whole)
    line = 0
    outcomes = set()
    while True:
        line += 1
        optimizer = copy.deepcopy(origin)
        if started:  # with a plan
            advance(optimizer, all_params(optimizer), [[None] * len(params)])
        set_grads(all_params(optimizer), rows[1])
        before = snapshot(optimizer)
        interrupted = interrupt_at(line, optimizer.step)
        # A tracer can raise where a `with` is left and its exit not called yet; Ctrl-C comes later.
        torch.set_grad_enabled(True)
        after = snapshot(optimizer)
        assert equal(after, before) or equal(after, want), f"line {line}"
        outcomes.add((interrupted, equal(after, want)))
        if not equal(after, want):
            optimizer.step()
        assert equal(snapshot(optimizer), want), f"after line {line}"
        advance(optimizer, all_params(optimizer), rows[2:])
        if not interrupted:
            break
    assert {(True, False), (False, True)} <= outcomes


@every_backend
@every_entry
def test_exceptions_in_closures_and_hooks_change_nothing(entry: Entry, backend: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    optimizer, other = entry.build(params, backend), entry.build(make_params(SHAPES), backend)
    for row in rows[:2]:
        set_grads(params, row)
        before = snapshot(optimizer)

        def refuse(*_: object) -> float:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            optimizer.step(refuse)
        handle = optimizer.register_step_pre_hook(refuse)  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        handle.remove()
        assert_unchanged(optimizer, before)
        handle = optimizer.register_step_post_hook(refuse)  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError):
            optimizer.step()  # has happened when the hook is called
        handle.remove()
        advance(other, all_params(other), [row])
    continues_alike(optimizer, other, rows[2:])
