"""norm="in_backward": hooks follow the parameters, and hold nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from backward import backward, full, held, pair
from battery import (
    all_params,
    assert_same_bits,
    assert_same_snapshot,
    make_params,
    record_grads,
    snapshot,
)

from pysmooth import ClipSGD


def test_frozen_parameters_join_when_they_are_trained() -> None:
    ours, optimizer, plain, reference = pair()
    for frozen in (ours[0], plain[0]):
        frozen.requires_grad_(False)
    params = make_params()
    params[0].requires_grad_(False)
    optimizer = ClipSGD(params, 0.1, max_norm=0.5, momentum=0.9, norm="in_backward")
    for i, row in enumerate(record_grads(ours, 5)):
        if i == 2:
            for p in (params[0], plain[0]):
                p.requires_grad_(True)
        part = [None if i < 2 and k == 0 else g for k, g in enumerate(row)]
        for some, o in ((params, optimizer), (plain, reference)):
            o.zero_grad()
            backward(some, part)
            o.step()
        # Its first gradient comes before its hook.
        assert optimizer.sums_from_backward() == full(ours) - (i <= 2)
    assert_same_bits(params, plain)


def test_new_group_and_replaced_parameter() -> None:
    params = make_params([(5,), (70_000,), (3,)])
    optimizer = ClipSGD(params[:2], 0.1, max_norm=1.0, norm="in_backward")
    optimizer.add_param_group({"params": params[2:]})
    backward(params, record_grads(params, 1)[0])
    optimizer.step()
    assert optimizer.sums_from_backward() == 3
    new = torch.nn.Parameter(torch.ones(5))
    optimizer.param_groups[0]["params"][0] = new
    for expected in (2, 3):  # its hook comes with the step that finds it
        optimizer.zero_grad()
        now = [new, *params[1:]]
        backward(now, record_grads(now, 1)[0])
        optimizer.step()
        assert optimizer.sums_from_backward() == expected
    assert [held(p) for p in (*params, new)] == [0, 1, 1, 1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load_state_dict"])
def test_a_copy_has_hooks_of_its_own(how: str) -> None:
    ours, optimizer, _, _ = pair()
    rows = record_grads(ours, 4)
    backward(ours, rows[0])
    optimizer.step()
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        twins = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        other = ClipSGD(twins, 0.1, max_norm=0.5, momentum=0.9, norm="in_backward")
        other.load_state_dict(optimizer.state_dict())
    copies = all_params(other)
    assert [held(p) for p in (*ours, *copies)] == [1] * 2 * len(ours)
    for row in rows[1:]:
        for params, o in ((ours, optimizer), (copies, other)):
            o.zero_grad()
            backward(params, row)
            o.step()
            assert o.sums_from_backward() == full(ours)
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


def test_hooks_go_with_the_optimizer_and_do_not_hold_it() -> None:
    params, optimizer, _, _ = pair()
    second = ClipSGD(params, 0.1, max_norm=1.0, norm="in_backward")
    backward(params, record_grads(params, 1)[0])
    optimizer.step()
    second.step()
    assert second.sums_from_backward() == full(params)
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()  # counting references is enough: there is no cycle
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    assert [held(p) for p in params] == [1] * len(params)
    del second
    gc.collect()
    assert not any(held(p) for p in params)
    kept = [weakref.ref(p) for p in params]
    del params
    assert not any(ref() for ref in kept)


def test_sums_keep_no_gradient_alive() -> None:
    params, optimizer, _, _ = pair()
    for _ in range(2):
        backward(params, record_grads(params, 1)[0])
        gradients = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        assert not any(ref() for ref in gradients)
