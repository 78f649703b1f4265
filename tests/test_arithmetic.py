"""The kernels' arithmetic: conversions, tails, sums at the edges, every dtype pair, every rule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pysmooth
from pysmooth import _cpu, reference

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture(params=_cpu.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set level that this CPU has, one after the other."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def step(param: Tensor, grad: Tensor, **kwargs: object) -> Tensor:
    p = torch.nn.Parameter(param.clone())
    if grad.dtype != p.dtype:
        p.grad_dtype = grad.dtype
    p.grad = grad
    pysmooth.ClipSGD([p], backend="cpu", **{"lr": 1.0, **kwargs}).step()
    return p.detach()


def every_16_bit_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_of_all_16_bit_values(isa: str, dtype: torch.dtype) -> None:
    values = every_16_bit_pattern(dtype)
    # 0 - 1 * (-g), in float32, must be the exact value of g.
    loaded = step(torch.zeros(2**16), values, maximize=True)
    torch.testing.assert_close(loaded, values.float(), rtol=0, atol=0, equal_nan=True)
    # Body and tail convert alike: the same values, shifted by one so that another lane has them.
    for skip in (1, 3):
        shifted = step(torch.zeros(2**16 - skip), values[skip:], maximize=True)
        torch.testing.assert_close(shifted, values.float()[skip:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    exact = every_16_bit_pattern(dtype).float()
    exact = exact[exact.isfinite()]
    up = torch.nextafter(exact, torch.tensor(math.inf))
    half = (exact + torch.roll(exact, -1)) / 2  # midpoints of neighbours, and some strangers
    values = torch.cat([exact, up, half, torch.randn(1001) * 1e-6, torch.randn(1001) * 1e5])
    values = torch.cat(
        [values, torch.tensor([math.inf, -math.inf, math.nan, 1e38, 1e-45, 65520.0])]
    )
    zero = torch.zeros(len(values), dtype=dtype)
    stored = step(zero, values, maximize=True)
    torch.testing.assert_close(stored, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tails_equal_bodies(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(400, generator=generator).to(dtype)
    g = torch.randn(400, generator=generator).to(dtype)
    settings_ = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "nesterov": True}
    whole = step(p, g, **settings_)
    for n in range(1, 4 * 64 + 4):
        assert torch.equal(step(p[:n], g[:n], **settings_), whole[:n]), n


@pytest.mark.parametrize("n", [32767, 32768, 32769, 3 * 32768 + 5])
def test_chunk_borders(n: int) -> None:
    p, g = torch.randn(n), torch.randn(n)
    expected = p - 0.5 * g
    assert torch.equal(step(p, g, lr=0.5), expected)
    torch.testing.assert_close(
        pysmooth.get_total_norm([g]).double(), g.double().norm(), rtol=1e-7, atol=0
    )


def test_published_rules_are_those_of_the_reference() -> None:
    native = {
        r["name"]: (r["hyper"], r["states"], r["counts_steps"], r["accumulates"])
        for r in _cpu.rules()
    }
    eager = {
        r.name: (r.hyper, r.states, r.counts_steps, r.accumulates) for r in reference.RULES.values()
    }
    assert native == eager


@pytest.mark.parametrize("pair", [(p, g) for p in DTYPES for g in DTYPES], ids="-".join)
def test_dtype_pairs(pair: tuple[str, str]) -> None:
    published = next(r for r in _cpu.rules() if r["name"] == "sgd_momentum")["dtypes"]
    param, grad = torch.ones(100, dtype=DTYPES[pair[0]]), torch.ones(100, dtype=DTYPES[pair[1]])
    if pair in published:
        assert torch.equal(step(param, grad, lr=0.5, momentum=0.9), param - 0.5)
    else:
        with pytest.raises(TypeError, match=f"dtype {pair[1]} and its parameter {pair[0]}"):
            step(param, grad, momentum=0.9)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    dtype=st.sampled_from(list(DTYPES.values())),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_norms_of_any_list(sizes: list[int], dtype: torch.dtype, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [(scale * torch.randn(n, generator=generator)).to(dtype) for n in sizes]
    expected = torch.cat([t.double() for t in tensors]).norm()
    torch.testing.assert_close(
        pysmooth.get_total_norm(tensors).double(), expected, rtol=2e-7, atol=1e-30
    )


# ---- sums at the edges ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64, 65, 8191, 8192, 8193, 40000])
@pytest.mark.parametrize("value", [1e30, 3e38, 1e-25, 1e-40, 1.4e-45, 0.0])
def test_squares_neither_overflow_nor_vanish(isa: str, size: int, value: float) -> None:
    x = torch.full((size,), value)
    expected = float(x[0].double()) * math.sqrt(size)
    # Beyond the largest float32, the float32 norm is infinite; the sum behind it is not.
    limit = torch.finfo(torch.float32).max
    norm = float(pysmooth.get_total_norm([x]))
    if expected > limit:
        assert norm == math.inf
    else:
        assert norm == pytest.approx(expected, rel=1e-6, abs=1e-45)


def test_small_terms_beside_large_ones_are_summed_in_order() -> None:
    x = torch.full((100_000,), 1e-20)
    x[77_777] = 1e25
    assert float(pysmooth.get_total_norm([x])) == pytest.approx(1e25, rel=1e-6)
    assert float(pysmooth.get_total_norm([x], 1.0)) == pytest.approx(1e25, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 8191, 8192, 32767, 32768, 40_000])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_nonfinite_anywhere_is_found(bad: float, at: int, norm_type: float) -> None:
    x = torch.ones(40_001)
    x[at] = bad
    norm = float(pysmooth.get_total_norm([x], norm_type))
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    p = torch.nn.Parameter(torch.zeros(40_001))
    p.grad = x
    optimizer = pysmooth.ClipSGD([p], 1.0, nonfinite="skip", norm_type=norm_type, backend="cpu")
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    assert torch.count_nonzero(p) == 0


def test_accuracy_on_a_million() -> None:
    x = torch.randn(1_000_003, generator=torch.Generator().manual_seed(3))
    norm = pysmooth._clip_grad.native_module().grad_norm([x], 2.0, 2)[0]
    assert norm == pytest.approx(float(x.double().norm()), rel=2e-8)


def test_more_than_2_to_the_31_elements() -> None:
    # Expanded: the elements are there to be counted, the memory is not.
    n = 2**31 + 3
    x = torch.ones(1, dtype=torch.bfloat16).expand(n)
    norm = pysmooth._clip_grad.native_module().grad_norm([x], 1.0, 2)[0]
    assert norm == n
