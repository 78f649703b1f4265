"""GradScaler inside the step: gradients stay as they are, everything counts in unscaled units."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from battery import BACKENDS, assert_same_bits, make_params, record_grads, set_grads
from torch import Tensor

from pysmooth import EF21, AdagradNorm, AdamW, ClipSGD, TopK

every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(30,), (5, 7)]


def scaler_of(scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # it sets itself up when it first scales something
    return scaler


def scaled(row: list[Tensor], scale: float) -> list[Tensor]:
    return [g * scale for g in row]


@every_backend
def test_gradients_are_read_only(backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = AdamW(params, 0.1, max_norm=1.0, backend=backend)
    row = scaled(record_grads(params, 1)[0], 512.0)
    set_grads(params, row)
    before = [p.grad.clone() for p in params if p.grad is not None]
    scaler_of(512.0).step(optimizer)
    for p, g in zip(params, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@every_backend
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_the_norm_is_of_unscaled_gradients(norm_type: float, backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = ClipSGD(params, 0.1, max_norm=1.0, norm_type=norm_type, backend=backend)
    row = record_grads(params, 1)[0]
    set_grads(params, scaled(row, 512.0))
    scaler_of(512.0).step(optimizer)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in row]), norm_type)
    found, coef = optimizer.last_norm(), optimizer.last_clip_coef()
    assert found is not None
    assert coef is not None
    assert float(found) == pytest.approx(float(norm), rel=1e-5)
    assert float(coef[0]) == pytest.approx(min(1.0, 1.0 / (float(norm) + 1e-6)), rel=1e-5)


@every_backend
@pytest.mark.parametrize("scale", [1000.0, 3.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda p, b: AdamW(p, 0.01, max_norm=0.3, backend=b),
        lambda p, b: ClipSGD(p, 0.1, clip="value", max_norm=0.5, backend=b),
        lambda p, b: ClipSGD(p, 0.1, momentum=0.9, backend=b),
        lambda p, b: AdagradNorm(p, 0.1, b_init=0.5, max_norm=1.0, backend=b),
        lambda p, b: EF21(p, 0.1, TopK(ratio=0.2), init="full", maximize=True, backend=b),
    ],
    ids=["adamw", "value", "momentum", "norm", "ef21"],
)
def test_equals_unscaled_steps(make: Any, scale: float, backend: str) -> None:
    """To rounding: of the scale's reciprocal, and of the gradient that unscale_() would store."""
    params, expected = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = make(params, backend), make(expected, backend)
    scaler = scaler_of(scale)
    for row in record_grads(params, 3):
        set_grads(params, scaled(row, scale))
        set_grads(expected, row)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every_backend
def test_small_float16_gradients_survive(backend: str) -> None:
    """unscale_() would round them to 0 before the step reads them."""
    tiny = 1e-9
    for unscale in (True, False):
        p = torch.nn.Parameter(torch.zeros(40, dtype=torch.float16))
        optimizer = ClipSGD([p], 1e6, backend=backend)
        p.grad = torch.full_like(p, tiny * 2**20)
        scaler = scaler_of(2.0**20)
        if unscale:
            with pytest.raises(ValueError, match="FP16"):  # torch refuses, for this reason
                scaler.unscale_(optimizer)
            continue
        optimizer.grad_scale = torch.tensor(2.0**20)  # type: ignore[attr-defined]
        optimizer.step()
        assert float(p[0].detach()) == pytest.approx(-tiny * 1e6, rel=2e-3)


@every_backend
def test_an_overflow_leaves_everything(backend: str) -> None:
    params = make_params(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, 0.1, max_norm=1.0, nonfinite="raise", backend=backend)
    row = record_grads(params, 1)[0]
    row[1][2, 3] = math.inf
    set_grads(params, row)
    scaler = scaler_of(4.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert len(optimizer.state) == 0
    assert optimizer.skipped_steps() == 0  # the scaler's decision, not the policy's
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@every_backend
def test_external_lets_the_scaler_unscale(backend: str) -> None:
    """As for an optimizer that knows nothing of scales: callers may clip what they see."""
    params, expected = make_params(SHAPES), make_params(SHAPES)
    optimizer = AdamW(params, 0.01, backend=backend, amp="external")
    plain = AdamW(expected, 0.01, backend=backend)
    copied = copy.deepcopy(optimizer)
    assert not getattr(copied, "_step_supports_amp_scaling")  # noqa: B009 - torch's private name
    scaler = scaler_of(4.0)
    for row in record_grads(params, 3):
        set_grads(params, scaled(row, 4.0))
        set_grads(expected, row)
        scaler.step(optimizer)
        assert_same_bits([p.grad for p in params], [p.grad for p in expected])
        scaler.update()
        plain.step()
    assert_same_bits(params, expected)
    set_grads(params, [torch.full_like(p, math.inf) for p in params])
    scaler.step(optimizer)  # which does not come to the optimizer
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same_bits(params, expected)


def test_amp_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="amp must be one of fused, external; got 'none'"):
        ClipSGD(make_params(SHAPES), 0.1, amp="none")  # type: ignore[typeddict-item]
