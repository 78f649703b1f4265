"""Copies and checkpoints of every optimizer of the registry."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from battery import (
    advance,
    all_params,
    continues_alike,
    every_backend,
    every_entry,
    every_variant,
    make_params,
    record_grads,
)
from registry import Entry, Kwargs


@every_backend
@every_variant
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
def test_copy_in_mid_training_continues_with_the_same_bits(
    entry: Entry, kwargs: Kwargs, backend: str, how: str
) -> None:
    params = make_params()
    rows = record_grads(params, 8)
    optimizer = entry.make(params, backend=backend, **kwargs)
    advance(optimizer, params, rows[:4])
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = entry.make(twins, backend=backend, **kwargs)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert type(other) is type(optimizer)
    assert all(p is not q for p, q in zip(all_params(other), params, strict=True))
    continues_alike(optimizer, other, rows[4:])


@every_backend
@every_entry
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_checkpoint_keeps_the_precision_of_states(
    entry: Entry, dtype: torch.dtype, backend: str
) -> None:
    if dtype not in entry.dtypes:
        pytest.skip(f"{entry.name} does not take {dtype}")
    params = make_params(dtype=dtype)
    rows = record_grads(params, 6)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:3])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = entry.build(twins, backend)
    other.load_state_dict(optimizer.state_dict())
    continues_alike(optimizer, other, rows[3:])


@every_backend
@every_entry
def test_deepcopy_of_a_fresh_optimizer(entry: Entry, backend: str) -> None:
    params = make_params()
    optimizer = entry.build(params, backend)
    continues_alike(optimizer, copy.deepcopy(optimizer), record_grads(params, 3))
