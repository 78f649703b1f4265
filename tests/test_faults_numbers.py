"""Hyper-parameters and gradients that are no finite or no dense numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from battery import (
    advance,
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
from pysmooth import NonFiniteGradientError
from pysmooth.optim._host_step import HostStepOptimizer

SHAPES = ((5, 3), (), (0, 2), (33,))

# No limit: a clip at infinity takes the norm, and clips nothing.
MAY_BE_INFINITE = ("max_norm", "tau", "agc_factor", "max_step", "growth")


def read_numbers(optimizer: Any) -> list[str]:
    """The keys of numbers in the group that take part in a step."""
    (group,) = optimizer.param_groups
    floats = [key for key, value in group.items() if isinstance(value, float)]
    if isinstance(optimizer, HostStepOptimizer):
        # A choice is made of them; what it remembers is no argument.
        return [key for key in floats if key not in ("step_size", *optimizer.memory)]
    if optimizer.absorbs:
        floats.remove("momentum")  # which it does not take

    def numbers(group: dict[str, Any]) -> Any:
        recipe = optimizer.recipe(group)
        return recipe.hyper, recipe.clip

    return [key for key in floats if numbers({**group, key: 0.123}) != numbers(group)]


@every_backend
@every_variant
def test_what_is_no_finite_number_is_named_before_it_gets_into_states(
    entry: Entry, kwargs: Kwargs, backend: str
) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    optimizer = entry.make(params, backend=backend, **kwargs)
    advance(optimizer, params, rows[:1])
    (group,) = optimizer.param_groups
    read = read_numbers(optimizer)
    assert read
    for key in read:
        for bad in (math.nan, math.inf):
            if bad == math.inf and key in MAY_BE_INFINITE:
                continue
            good, before = group[key], snapshot(optimizer)
            group[key] = bad
            set_grads(params, rows[1])
            with pytest.raises(ValueError, match=key):
                optimizer.step()
            assert_unchanged(optimizer, before)
            group[key] = good
    advance(optimizer, params, rows[1:])


@every_entry
def test_infinite_numbers_are_refused_by_constructors(entry: Entry) -> None:
    (p,) = make_params([(3,)])
    numbers = [k for k, v in entry.main.items() if isinstance(v, float)]
    for key in set(numbers) - set(MAY_BE_INFINITE):
        with pytest.raises(ValueError, match=rf"{key}|lr"):
            entry.build([p], "auto", **{key: math.inf})


@every_backend
@every_entry
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_policy_zero_keeps_every_state_finite(entry: Entry, backend: str, value: float) -> None:
    """Also one that starts as the gradient."""
    (p,) = make_params([(40,)])
    try:
        optimizer = entry.build([p], backend, nonfinite="zero")
    except ValueError:
        pytest.skip("does not take 'zero'")
    for row in record_grads([p], 3):
        set_grads([p], row)
        p.grad[3] = value
        optimizer.step()
        assert p.isfinite().all()
        for key, state in optimizer.state[p].items():
            assert torch.as_tensor(state).isfinite().all(), key


@every_backend
def test_a_clip_that_comes_later_under_policy_zero(backend: str) -> None:
    """Its norm would be NaN, and then all of the residual."""
    params = make_params([(40,), (3,)])
    compressor = pysmooth.compressors.TopK(k=2)
    optimizer = pysmooth.EFSGD(params, 0.1, compressor, nonfinite="zero", backend=backend)
    rows = record_grads(params, 2)
    set_grads(params, rows[0])
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["max_norm"] = 1.0
    set_grads(params, rows[1])
    with pytest.raises(ValueError, match="nonfinite='zero' does not go with clip='hard'"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_backend
@pytest.mark.parametrize("init", ["compressed", "full"])
def test_sparse_gradient_where_states_start_as_gradients(backend: str, init: Any) -> None:
    compressor = pysmooth.compressors.TopK(k=2)
    (p,) = make_params([(6, 2)])
    optimizer = pysmooth.EF21([p], 0.1, compressor, init=init, eta=0.5, backend=backend)
    before = snapshot(optimizer)
    p.grad = torch.ones(6, 2).to_sparse()
    with pytest.raises(ValueError, match="only dense"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_backend
def test_momentum_given_to_an_optimizer_that_absorbs(backend: str) -> None:
    if backend not in ("cpu", "eager"):
        pytest.skip("absorb=True is for these")
    (p,) = make_params([(6,)])
    compressor = pysmooth.compressors.TopK(k=2)
    optimizer = pysmooth.EFSGD([p], 0.1, compressor, absorb=True, backend=backend)
    optimizer.param_groups[0]["momentum"] = 0.5
    p.grad = torch.ones(6)
    with pytest.raises(ValueError, match="absorb=True does not go with momentum"):
        optimizer.step()


def test_non_finite_error_is_no_other() -> None:
    """A RuntimeError, so that those who catch torch's go on catching."""
    assert issubclass(NonFiniteGradientError, RuntimeError)


@every_backend
def test_a_nan_stays_the_largest_second_moment(backend: str) -> None:
    """As in torch: max() with a NaN is NaN, whichever side it is on."""
    (p,), (q,) = make_params([(6,)]), make_params([(6,)])
    ours = pysmooth.Adam([p], 0.1, amsgrad=True, backend=backend)
    theirs = torch.optim.Adam([q], 0.1, amsgrad=True)
    for value in (float("nan"), 1.0):
        for x, optimizer in ((p, ours), (q, theirs)):
            x.grad = torch.ones_like(x)
            x.grad[2] = value
            optimizer.step()
    kept, expected = ours.state[p]["max_exp_avg_sq"], theirs.state[q]["max_exp_avg_sq"]
    assert torch.equal(kept.isnan(), expected.isnan())
    assert kept.isnan().sum() == 1
    # Once the moment itself is finite again, what was the largest is not.
    ours.state[p]["exp_avg_sq"].zero_()
    theirs.state[q]["exp_avg_sq"].zero_()
    for x, optimizer in ((p, ours), (q, theirs)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    kept, expected = ours.state[p]["max_exp_avg_sq"], theirs.state[q]["max_exp_avg_sq"]
    assert torch.equal(kept.isnan(), expected.isnan())
    assert kept.isnan().sum() == 1


@every_backend
def test_a_zero_gradient_is_normalised_to_zero(backend: str) -> None:
    params = make_params([(5,), (3, 2)])
    optimizer = pysmooth.NormalizedSGD(params, 0.1, backend=backend)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
