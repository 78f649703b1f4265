"""Gradients that are not finite, and loss scales, for every optimizer of the registry."""

from __future__ import annotations

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    assert_unchanged,
    every_backend,
    every_entry,
    every_variant,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from registry import Entry, Kwargs

import pysmooth

# ---- non-finite gradients -----------------------------------------------------------------------

BAD = [float("inf"), float("-inf"), float("nan")]


def spoil(params: list[torch.nn.Parameter], which: int, value: float) -> None:
    params[which].grad.view(-1)[-1] = value


@every_backend
@every_variant
@pytest.mark.parametrize("value", BAD)
def test_skip_leaves_everything_as_it_was(
    entry: Entry, kwargs: Kwargs, backend: str, value: float
) -> None:
    params = make_params()
    rows = record_grads(params, 3)
    optimizer = entry.make(params, backend=backend, **{**kwargs, "nonfinite": "skip"})
    for count, row in enumerate(rows):  # in the very first step and in later ones
        before = snapshot(optimizer)
        set_grads(params, row)
        spoil(params, 4, value)
        optimizer.step()
        assert_unchanged(optimizer, before)
        assert optimizer.skipped_steps() == count + 1
        advance(optimizer, params, [row])
        assert optimizer.skipped_steps() == count + 1
    clean = make_params()
    advance(entry.make(clean, backend=backend, **kwargs), clean, rows)
    assert_same_bits(params, clean)


@every_backend
@every_entry
def test_skipped_steps_outlive_a_new_group_and_a_load(entry: Entry, backend: str) -> None:
    """The counter counts since construction."""
    params = make_params([(4,), (3,)])
    optimizer = entry.build(params[:1], backend, nonfinite="skip")
    params[0].grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.skipped_steps() == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps() == 1
    optimizer.step()
    assert optimizer.skipped_steps() == 2


@every_backend
@every_variant
def test_raise_names_the_parameter_and_changes_nothing(
    entry: Entry, kwargs: Kwargs, backend: str
) -> None:
    params = make_params()
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    optimizer = entry.make(named, backend=backend, **{**kwargs, "nonfinite": "raise"})
    rows = record_grads(params, 2)
    for row in rows:
        before = snapshot(optimizer)
        set_grads(params, row)
        spoil(params, 2, float("nan"))
        spoil(params, 5, float("inf"))
        with pytest.raises(pysmooth.NonFiniteGradientError) as error:
            optimizer.step()
        assert "layer2.weight" in str(error.value)
        assert "layer5.weight" in str(error.value)
        assert "layer4.weight" not in str(error.value)
        assert_unchanged(optimizer, before)
        advance(optimizer, params, [row])
    clean = make_params()
    advance(entry.make(clean, backend=backend, **kwargs), clean, rows)
    assert_same_bits(params, clean)


@every_backend
@every_entry
def test_unnamed_parameters_are_told_by_their_place(entry: Entry, backend: str) -> None:
    params = make_params([(2,), (3,), (4,)])
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = entry.build(groups, backend, nonfinite="raise")
    set_grads(params, record_grads(params, 1)[0])
    spoil(params, 2, float("nan"))
    with pytest.raises(pysmooth.NonFiniteGradientError, match="group 1, parameter 1"):
        optimizer.step()


@every_backend
@every_entry
@pytest.mark.parametrize("value", BAD)
def test_propagate_lets_a_nan_through(entry: Entry, backend: str, value: float) -> None:
    """With one norm over all, as with torch's clip_grad_norm_, a NaN reaches every parameter."""
    params = make_params([(4,), (3,)])
    if not entry.clips:  # what keeps a residual
        with pytest.raises(ValueError, match="nonfinite must be one of skip, raise, zero"):
            entry.build(params, backend, nonfinite="propagate")
        return
    optimizer = entry.build(params, backend, nonfinite="propagate")
    set_grads(params, record_grads(params, 1)[0])
    spoil(params, 0, value)
    optimizer.step()
    assert not params[0][-1].isfinite()
    # An infinite norm clips the rest to 0; what divides by a norm of all of it is NaN then.
    assert params[1].isfinite().all() == (value == value and not entry.joint)
    assert optimizer.skipped_steps() == 0


# ---- mixed precision ----------------------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(entry: Entry, backend: str, unscale: bool) -> None:
    """Scaled gradients, the clip still in the units of the unscaled ones."""
    params, expected = make_params(), make_params()
    rows = record_grads(params, 4)
    optimizer, plain = entry.build(params, backend), entry.build(expected, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, row in enumerate(rows):
        before = snapshot(optimizer)
        scale = scaler.get_scale()
        optimizer.zero_grad()
        loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(params, row, strict=True))
        scaler.scale(loss).backward()
        if i == 2:
            spoil(params, 4, float("inf"))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            assert_unchanged(optimizer, before)
            assert scaler.get_scale() < scale
        else:
            advance(plain, expected, [row])  # a power of two: unscaling is exact
    assert_same_bits(params, expected)
