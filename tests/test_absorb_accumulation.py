"""EFSGD(absorb=True): several gradients a step, bad ones, and those set by hand."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from absorbing import assert_same, pending
from backward import Params, backward
from battery import (
    assert_same_bits,
    assert_same_snapshot,
    every_backend,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)

import pysmooth
from pysmooth import EFSGD
from pysmooth.compressors import Compressor, Identity, ScaledSign, TopK

# ---- accumulation -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("compressor", [Identity(), ScaledSign(), TopK(ratio=0.1)], ids=repr)
def test_several_backward_passes_add_up(compressor: Compressor, backend: str) -> None:
    """Against float64: the residual takes lr * g of each, weight decay once."""
    params = make_params([(40,), (3, 5)])
    optimizer = EFSGD(
        params, 0.1, compressor, weight_decay=0.5, absorb=True, backend=backend, maximize=True
    )
    rows = record_grads(params, 6)
    for i in range(0, 6, 3):
        before = [optimizer.residual(p).double() for p in params]
        start = [p.detach().double() for p in params]
        rates = (0.1, 0.1, 0.3)
        for lr, row in zip(rates, rows[i : i + 3], strict=True):
            optimizer.param_groups[0]["lr"] = lr
            backward(params, row)
        assert pending(optimizer) == [3, 3]
        for k, p in enumerate(params):
            want = before[k] + 0.1 * 0.5 * start[k]
            for lr, row in zip(rates, rows[i : i + 3], strict=True):
                want -= lr * row[k]
            torch.testing.assert_close(optimizer.residual(p).double(), want, rtol=1e-5, atol=1e-6)
        owed = [optimizer.residual(p) for p in params]
        optimizer.step()
        for k, p in enumerate(params):
            left = p.detach().double() - optimizer.residual(p).double()
            torch.testing.assert_close(left, start[k] - owed[k], rtol=1e-5, atol=1e-6)


@every_backend
def test_one_graph_backward_twice(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(40))
    optimizer = EFSGD([p], 0.5, Identity(), absorb=True, backend=backend)
    loss = (3 * p).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((40,), -3.0))


@every_backend
def test_a_step_that_is_left_out_comes_later(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = EFSGD([p], 1.0, Identity(), absorb=True, backend=backend)
    (2 * p).sum().backward()
    p.sum().backward()
    optimizer.step()
    optimizer.step()  # nothing is left
    assert torch.equal(p.detach(), torch.full((4,), -3.0))
    assert float(optimizer.state[p]["step"]) == 1


@every_backend
@pytest.mark.parametrize("compressor", [Identity(), ScaledSign(), TopK(k=2)], ids=repr)
def test_lr_0(compressor: Compressor, backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = EFSGD([p], 0.0, compressor, absorb=True, backend=backend)
    p.sum().backward()
    optimizer.step()
    assert not p.any()
    assert not optimizer.residual(p).any()
    optimizer.param_groups[0]["lr"] = 1.0
    p.sum().backward()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # absorbed, and not sent
    assert not p.any()
    assert torch.equal(optimizer.residual(p), torch.ones(4))
    optimizer.param_groups[0]["lr"] = 1.0
    (0 * p).sum().backward()
    optimizer.step()
    assert float(p.detach().sum()) == (-2.0 if isinstance(compressor, TopK) else -4.0)


@every_backend
def test_closure(backend: str) -> None:
    ours, plain = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": ScaledSign(), "backend": backend}
    optimizer, reference = EFSGD(ours, absorb=True, **kwargs), EFSGD(plain, **kwargs)
    for row in record_grads(ours, 2):
        for params, o in ((ours, optimizer), (plain, reference)):

            def closure(params: Params = params, o: EFSGD = o, row: Any = row) -> float:
                o.zero_grad()
                backward(params, row)
                return 1.0

            assert o.step(closure) == 1.0
    assert_same(optimizer, reference)


@every_backend
def test_backward_on_another_thread(backend: str) -> None:
    ours, plain = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": TopK(ratio=0.1), "backend": backend}
    optimizer, reference = EFSGD(ours, absorb=True, **kwargs), EFSGD(plain, **kwargs)
    row = record_grads(ours, 1)[0]
    worker = threading.Thread(target=backward, args=(ours, row))
    worker.start()
    worker.join()
    backward(plain, row)
    optimizer.step()
    reference.step()
    assert_same(optimizer, reference)


# ---- what is not finite -------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("compressor", [TopK(ratio=0.1), ScaledSign()], ids=repr)
def test_skip_drops_one_gradient(compressor: Compressor, backend: str) -> None:
    ours, expected = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": compressor, "backend": backend}
    optimizer, plain = EFSGD(ours, absorb=True, **kwargs), EFSGD(expected, **kwargs)
    for row in record_grads(ours, 3):
        bad = [g.clone() for g in row]
        bad[2][3] = float("nan")
        backward(ours, bad)
        assert all(p.grad is None for p in ours)
        optimizer.step()
        backward(expected, [None if k == 2 else g for k, g in enumerate(row)])
        plain.step()
        plain.zero_grad()
    assert optimizer.skipped_steps() == 3
    assert_same_bits(ours, expected)
    assert not optimizer.residual(ours[2]).any()


@every_backend
def test_raise_comes_out_of_backward(backend: str) -> None:
    named = [("a", torch.nn.Parameter(torch.ones(4))), ("b", torch.nn.Parameter(torch.ones(3)))]
    optimizer = EFSGD(named, 0.1, TopK(k=1), absorb=True, nonfinite="raise", backend=backend)
    b = named[1][1]
    with pytest.raises(pysmooth.NonFiniteGradientError, match="non-finite gradient in 'b'"):
        (b * float("inf")).sum().backward()
    assert b.grad is not None
    assert not any(pending(optimizer))
    assert not optimizer.state
    b.grad = None
    b.sum().backward()
    optimizer.step()
    assert float(optimizer.residual(b).sum()) == pytest.approx(0.2)


# ---- gradients by hand --------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_gradients_by_hand_are_one_step(policy: str, backend: str) -> None:
    """They are looked at together: nothing changes where one is not finite."""
    params = make_params()
    optimizer = EFSGD(params, 0.1, TopK(ratio=0.1), absorb=True, nonfinite=policy, backend=backend)
    row = record_grads(params, 1)[0]
    set_grads(params, row)
    params[4].grad[0] = float("nan")
    before = snapshot(optimizer)
    if policy == "raise":
        with pytest.raises(pysmooth.NonFiniteGradientError, match="group 0, parameter 4"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps() == 1
    assert_same_snapshot(snapshot(optimizer), before)
    params[4].grad[0] = 1.0
    optimizer.step()
    assert all(p.grad is None for p in params)
    assert not any(pending(optimizer))
    assert not torch.equal(params[4], before[0][4])
