"""Gradients that come and go, in any layout, for every optimizer of the registry."""

from __future__ import annotations

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    assert_unchanged,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
)
from registry import Entry

# ---- gradients that come and go -----------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(entry: Entry, backend: str, set_to_none: bool) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    for row in rows:
        optimizer.zero_grad(set_to_none=set_to_none)
        for p, g in zip(params, row, strict=True):
            # Accumulates into the old tensor, or moves to a new one.
            (p * g.to(p.dtype)).sum().backward()
        optimizer.step()
    advance(entry.build(expected, backend), expected, rows)
    assert_same_bits(params, expected)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in params)


@every_backend
@every_entry
def test_parameters_without_gradient_stay_as_they_are(entry: Entry, backend: str) -> None:
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = entry.build(params, backend)
    rows = record_grads(params, 3)
    for row in rows:
        set_grads(params, [g if i % 2 else None for i, g in enumerate(row)])
        optimizer.step()
    for i, (p, s) in enumerate(zip(params, start, strict=True)):
        assert same_bits(p, s) == (i % 2 == 0 or p.numel() == 0)
        held = optimizer.state.get(p, {})
        assert set(entry.state_keys(entry.main)) <= set(held) if i % 2 else not held


@every_backend
@every_entry
def test_no_gradient_at_all_changes_nothing(entry: Entry, backend: str) -> None:
    params = make_params()
    optimizer = entry.build(params, backend)
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)
    assert not any(before[1])


@every_backend
@every_entry
def test_gradients_that_appear_late_and_vanish(entry: Entry, backend: str) -> None:
    """A parameter's first step is the first with a gradient; pauses leave its state alone."""
    present = ((True, False), (True, True), (False, True), (True, True))
    params, expected = make_params([(5,), (40,)]), make_params([(5,), (40,)])
    rows = record_grads(params, len(present))
    optimizer = entry.build(entry.apart(params), backend, **entry.tensors)
    for row, here in zip(rows, present, strict=True):
        set_grads(params, [g if h else None for g, h in zip(row, here, strict=True)])
        optimizer.step()
    for i, p in enumerate(expected):
        own = [[row[i]] for row, here in zip(rows, present, strict=True) if here[i]]
        advance(entry.build([p], backend, **entry.tensors), [p], own)
    assert_same_bits(params, expected)


# ---- layouts ------------------------------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("case", ["channels_last", "transposed", "expanded", "sliced", "offset"])
def test_layout_of_a_gradient_does_not_matter(entry: Entry, backend: str, case: str) -> None:
    params, expected = make_params([(4, 3, 5, 5), (6,)]), make_params([(4, 3, 5, 5), (6,)])
    if case == "channels_last":
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    for row in record_grads(params, 4):
        g = row[0].float()
        if case == "transposed":
            used = g.transpose(0, 3).contiguous().transpose(0, 3)
            assert not used.is_contiguous()
        elif case == "expanded":
            used = g[:, :1, :1].expand_as(g)
            g = used.contiguous()
        elif case == "sliced":
            used = torch.stack([g, torch.full_like(g, float("nan"))], dim=-1)[..., 0]
        elif case == "offset":
            used = torch.cat([torch.zeros(1), g.reshape(-1)])[1:].view_as(g)
        else:
            used = g
        set_grads(expected, [g, row[1]])
        set_grads(params, [None, row[1]])
        params[0].grad = used
        optimizer.step()
        plain.step()
        for p, q in zip(params, expected, strict=True):
            # Another order of summation: the norm, hence the step, may differ in the last place.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)
