"""Every optimizer of the registry against the float64 oracle, and against its torch twin."""

from __future__ import annotations

import pytest
import torch
from battery import (
    EXAMPLES,
    STEPS,
    advance,
    assert_same_bits,
    every_backend,
    every_entry,
    every_variant,
    make_params,
    max_ulp,
    oracle,
    record_grads,
    same_bits,
    widest,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import Entry, Kwargs
from torch import Tensor

# ---- numbers ------------------------------------------------------------------------------------


def check_against_oracle(
    entry: Entry,
    kwargs: Kwargs,
    params: list[torch.nn.Parameter],
    rows: list[list[Tensor]],
    backend: str,
) -> None:
    """Errors grow with the steps: the bound is `entry.ulp` units in the last place for each."""
    exact = oracle(entry, kwargs, params, rows)
    optimizer = entry.make(params, backend=backend, **kwargs)
    advance(optimizer, params, rows)
    for i, p in enumerate(params):
        error = max_ulp(p, exact.params[i], exact.sizes[i])
        assert error <= entry.ulp * len(rows), f"parameter {i}: {error} ULP"
        for key in entry.state_keys(kwargs):
            state = optimizer.state[p][key]
            if state.numel() == 0:
                continue
            # A state's error is relative to what went into it: itself, gradients, decayed weights
            # or a mean of parameters (which, in 16 bits, carry the parameter's rounding).
            inputs = max(exact.peaks[i][key], *(float(row[i].abs().max()) for row in rows))
            share = 1.0 if key == "average" else kwargs.get("weight_decay", 0.0)
            carried = share * float(exact.sizes[i].max())
            bound = torch.finfo(state.dtype).eps * inputs + torch.finfo(p.dtype).eps * carried
            error = float((state.to(widest(state.dtype)) - exact.states[i][key]).abs().max())
            assert error <= entry.ulp * len(rows) * bound, f"{key} of parameter {i}: {error}"


@every_backend
@every_variant
def test_agrees_with_float64_reference(entry: Entry, kwargs: Kwargs, backend: str) -> None:
    params = make_params()
    check_against_oracle(entry, kwargs, params, record_grads(params, STEPS), backend)


@every_backend
@every_entry
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_every_dtype(entry: Entry, dtype: torch.dtype, backend: str) -> None:
    if dtype not in entry.dtypes and dtype != torch.complex128:
        pytest.skip(f"{entry.name} does not take {dtype}")
    params = make_params(dtype=dtype)
    check_against_oracle(entry, entry.main, params, record_grads(params, STEPS), backend)


@every_backend
@every_entry
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_of_float32_parameters(
    entry: Entry, grad_dtype: torch.dtype, backend: str
) -> None:
    params = make_params()
    for p in params:
        p.grad_dtype = grad_dtype
    rows = record_grads(params, STEPS, dtype=grad_dtype)
    check_against_oracle(entry, entry.main, params, rows, backend)
    assert all(p.grad.dtype == grad_dtype for p in params)


@every_backend
@every_entry
@settings(max_examples=EXAMPLES)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_lists_of_any_shapes(
    entry: Entry, backend: str, shapes: list[tuple[int, ...]], seed: int
) -> None:
    params = make_params(shapes, seed=seed)
    check_against_oracle(entry, entry.main, params, record_grads(params, 3, seed), backend)


@every_backend
@every_entry
def test_maximize_is_descent_on_the_negated_gradient(entry: Entry, backend: str) -> None:
    up, down = make_params(), make_params()
    rows = record_grads(up, 5)
    ascent = entry.build(up, backend, maximize=True)
    descent = entry.build(down, backend)
    advance(ascent, up, rows)
    advance(descent, down, [[-g for g in row] for row in rows])
    assert_same_bits(up, down)
    assert not same_bits(up[0], make_params()[0])


# ---- the torch twin -----------------------------------------------------------------------------


@every_backend
@every_entry
def test_equals_its_torch_twin(entry: Entry, backend: str) -> None:
    if entry.twin is None:
        pytest.skip("torch has no such optimizer")
    params, expected = make_params(), make_params()
    rows = record_grads(params, STEPS)
    advance(entry.make(params, backend=backend, **entry.twin_kwargs), params, rows)
    advance(entry.twin(expected, **entry.twin_kwargs), expected, rows)
    sizes = oracle(entry, entry.twin_kwargs, make_params(), rows).sizes
    for p, q, size in zip(params, expected, sizes, strict=True):
        assert max_ulp(p, q.detach().to(widest(q.dtype)), size) <= STEPS
