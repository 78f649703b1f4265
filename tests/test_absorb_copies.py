"""EFSGD(absorb=True): copies, checkpoints, and parameters that come and move."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from absorbing import assert_same, pending
from backward import backward
from battery import (
    all_params,
    assert_same_snapshot,
    every_backend,
    make_params,
    record_grads,
    snapshot,
)

from pysmooth import EFSGD
from pysmooth.compressors import Compressor, Identity, ScaledSign, TopK


@every_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
@pytest.mark.parametrize("compressor", [TopK(ratio=0.1), ScaledSign()], ids=repr)
def test_a_copy_between_backward_and_step_is_exact(
    compressor: Compressor, how: str, backend: str
) -> None:
    params = make_params()
    kwargs: dict[str, Any] = {
        "lr": 0.1,
        "compressor": compressor,
        "weight_decay": 0.1,
        "absorb": True,
        "backend": backend,
    }
    optimizer = EFSGD(params, **kwargs)
    rows = record_grads(params, 6)
    backward(params, rows[0])
    optimizer.step()
    backward(params, rows[1])
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = EFSGD([torch.nn.Parameter(p.detach().clone()) for p in params], **kwargs)
        other.load_state_dict(torch.load(file, weights_only=True))
    copies = all_params(other)
    assert pending(other) == pending(optimizer)
    for some, o in ((params, optimizer), (copies, other)):
        backward(some, rows[2])  # no second decay
        o.step()
        for row in rows[3:]:
            backward(some, row)
            assert all(p.grad is None for p in some)
            o.step()
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


def test_a_wrong_count_is_refused() -> None:
    (p,) = make_params([(4,)])
    optimizer = EFSGD([p], 0.1, TopK(k=1), absorb=True)
    p.sum().backward()
    saved = optimizer.state_dict()
    saved["state"][0]["absorbed"] = "many"
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="state 'absorbed' of parameter 'group 0, parameter 0'"):
        optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer), before)


def test_hooks_go_with_the_optimizer_and_do_not_hold_it() -> None:
    params = make_params()
    optimizer = EFSGD(params, 0.1, TopK(k=1), absorb=True)
    backward(params, record_grads(params, 1)[0])
    optimizer.step()
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    backward(params, record_grads(params, 1)[0])
    assert all(p.grad is not None for p in params)


@every_backend
def test_groups_with_their_own_lr_and_a_new_group(backend: str) -> None:
    params = make_params([(5,), (6,), (7,)])
    optimizer = EFSGD(
        [{"params": params[:1]}, {"params": params[1:2], "lr": 0.5}],
        1.0,
        Identity(),
        absorb=True,
        backend=backend,
    )
    start = [p.detach().clone() for p in params]
    for p in params[:2]:
        p.sum().backward()
    optimizer.add_param_group({"params": params[2:], "lr": 0.25})
    params[2].sum().backward()
    optimizer.step()
    for p, s, lr in zip(params, start, (1.0, 0.5, 0.25), strict=True):
        torch.testing.assert_close(p.detach(), s - lr)


@every_backend
def test_states_and_parameters_that_move(backend: str) -> None:
    ours, expected = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": TopK(ratio=0.1), "backend": backend}
    optimizer, plain = EFSGD(ours, absorb=True, **kwargs), EFSGD(expected, **kwargs)
    for i, row in enumerate(record_grads(ours, 4)):
        backward(ours, row)
        if i == 1:
            for p in ours:
                p.data = p.data.clone()
        if i == 2:
            for p in ours:
                optimizer.state[p]["residual"] = optimizer.state[p]["residual"].clone()
        optimizer.step()
        backward(expected, row)
        plain.step()
        plain.zero_grad()
    assert_same(optimizer, plain)
