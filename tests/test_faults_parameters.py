"""Parameters that rest, or are shared between groups or optimizers."""

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
    set_grads,
    snapshot,
)
from registry import Entry


@every_backend
@every_entry
def test_parameter_in_two_groups_is_refused(entry: Entry, backend: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer = entry.build(params, backend)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)


@every_backend
@every_entry
def test_parameter_of_two_optimizers(entry: Entry, backend: str) -> None:
    """Each keeps states of its own: turns are turns."""
    params, expected = make_params([(5,), (7,)]), make_params([(5,), (7,)])
    rows = record_grads(params, 4)
    first, second = (entry.build(params, backend) for _ in range(2))
    mirror = [entry.build(expected, "eager") for _ in range(2)]
    for i, row in enumerate(rows):
        advance((first, second)[i % 2], params, [row])
        advance(mirror[i % 2], expected, [row])
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@every_backend
@every_entry
def test_requires_grad_toggled(entry: Entry, backend: str) -> None:
    """A frozen parameter that keeps no gradient rests; thawed, it goes on where it was."""
    present = (True, False, False, True)
    params, expected = make_params([(5,), (40,)]), make_params([(5,), (40,)])
    rows = record_grads(params, len(present))
    optimizer = entry.build(entry.apart(params), backend, **entry.tensors)
    for row, here in zip(rows, present, strict=True):
        params[0].requires_grad_(here)
        set_grads(params, [row[0] if here else None, row[1]])
        optimizer.step()
    for i, p in enumerate(expected):
        own = [[row[i]] for row, here in zip(rows, present, strict=True) if here or i]
        advance(entry.build([p], backend, **entry.tensors), [p], own)
    assert_same_bits(params, expected)
