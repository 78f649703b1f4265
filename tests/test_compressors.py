"""Compressors and the random numbers they draw: definitions, identities, constants."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pysmooth import (
    QSGD,
    HardThreshold,
    Identity,
    NaturalCompression,
    RandK,
    ScaledSign,
    TopK,
)
from pysmooth.compressors import Compressor, flatten, unflatten
from pysmooth.reference import random

ALL: tuple[Compressor, ...] = (
    Identity(),
    TopK(ratio=0.1),
    TopK(k=3),
    TopK(ratio=0.2, scope="global"),
    TopK(ratio=0.1, scope="block", block_size=16),
    RandK(ratio=0.1),
    RandK(k=4, scaled=False, seed=9),
    ScaledSign(),
    ScaledSign(scope="global"),
    HardThreshold(0.5),
    QSGD(4, seed=1),
    QSGD(4, scope="block", block_size=16, seed=1),
    NaturalCompression(seed=2),
)
every = pytest.mark.parametrize("compressor", ALL, ids=repr)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(dtype)


# ---- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    out = random.philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in out) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_permutation(size: int) -> None:
    drawn = random.permutation(size, size, seed=3, step=4, tensor_id=5)
    assert sorted(drawn.tolist()) == list(range(size))
    fewer = random.permutation((size + 1) // 2, size, seed=3, step=4, tensor_id=5)
    assert torch.equal(fewer, drawn[: len(fewer)])


def test_draws_depend_on_everything_and_are_uniform() -> None:
    def draw(**changes: int) -> list[int]:
        drawn = random.permutation(20, 1000, **{"seed": 1, "step": 2, "tensor_id": 3, **changes})
        return sorted(drawn.tolist())

    assert draw() == draw()
    for other in ({"seed": 1 << 32 | 1}, {"seed": 2}, {"step": 3}, {"tensor_id": 4}):
        assert draw() != draw(**other)
    counts = torch.zeros(50)
    for step in range(2000):
        counts[random.permutation(5, 50, seed=0, step=step, tensor_id=0)] += 1
    # 200 each; five standard deviations
    assert float((counts - 200).abs().max()) < 5 * math.sqrt(200 * 0.9)


# ---- what all have in common ---------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_shape_dtype_layout(compressor: Compressor, dtype: torch.dtype) -> None:
    x = values(2, 5, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    out = compressor(x)
    assert (out.shape, out.dtype, out.stride()) == (x.shape, x.dtype, x.stride())
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


@every
def test_edges(compressor: Compressor) -> None:
    empty, scalar, zeros = compressor.compress(
        [torch.empty(0, 3), torch.tensor(2.0), values(9) * 0]
    )
    assert empty.shape == (0, 3)
    assert scalar.shape == ()
    assert scalar.isfinite()
    assert torch.count_nonzero(zeros) == 0 or compressor.scale_scope == "global"
    assert compressor.compress([]) == []


@every
def test_repeatable_equal_picklable(compressor: Compressor) -> None:
    x = values(300)
    other = pickle.loads(pickle.dumps(compressor))
    assert other == compressor
    assert hash(other) == hash(compressor)
    assert torch.equal(other(x, step=3, tensor_id=2), compressor(x, step=3, tensor_id=2))


@pytest.mark.parametrize("compressor", [c for c in ALL if c.alpha(64) is not None], ids=repr)
def test_contraction(compressor: Compressor) -> None:
    """||C(x) - x||^2 <= (1 - alpha) ||x||^2; for rand-k on average over draws."""
    x = values(64, seed=3, dtype=torch.float64)
    alpha = compressor.alpha(64)
    assert alpha is not None
    draws = 400 if isinstance(compressor, RandK) else 1
    error = sum(float((compressor(x, step=s) - x).square().sum()) for s in range(draws)) / draws
    slack = 1.05 if draws > 1 else 1 + 1e-12
    assert error <= (1 - alpha) * float(x.square().sum()) * slack


def test_the_worst_case_of_signs() -> None:
    """One coordinate that is not 0: alpha is all that is gained."""
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 2.0
    compressor = ScaledSign()
    assert compressor.alpha(64) == 1 / 64
    assert float((compressor(x) - x).square().sum()) == pytest.approx(4 * (1 - 1 / 64))


@pytest.mark.parametrize("compressor", [c for c in ALL if c.omega(40) is not None], ids=repr)
def test_unbiased_with_bounded_variance(compressor: Compressor) -> None:
    x = values(40, seed=4, dtype=torch.float64)
    omega = compressor.omega(40)
    assert omega is not None
    draws = torch.stack([compressor(x, step=s) for s in range(3000)])
    deviation = draws.std(dim=0) / math.sqrt(3000)
    assert bool(((draws.mean(dim=0) - x).abs() <= 5 * deviation + 1e-12).all())
    variance = float((draws - x).square().sum(dim=1).mean())
    assert variance <= omega * float(x.square().sum()) * 1.05 + 1e-20


@pytest.mark.parametrize(
    "compressor",
    [c for c in ALL if isinstance(c, TopK | HardThreshold | Identity | NaturalCompression)]
    + [RandK(ratio=0.1, scaled=False)],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost(compressor: Compressor, dtype: torch.dtype) -> None:
    """Compressed + residual is the input, to the bit."""
    x = values(1000, dtype=dtype)
    sent = compressor(x)
    assert torch.equal(sent + (x - sent), x)


# ---- one by one ----------------------------------------------------------------------------------


def test_top_k_breaks_ties_by_index() -> None:
    x = torch.tensor([1.0, -2.0, 2.0, 0.0, -2.0, 1.0])
    assert TopK(k=2)(x).tolist() == [0, -2, 2, 0, 0, 0]
    assert TopK(k=4)(x).tolist() == [1, -2, 2, 0, -2, 0]
    assert torch.equal(TopK(k=99)(x), x)
    assert TopK(ratio=0.5).chosen_of(7) == 4
    assert TopK(ratio=1e-9).chosen_of(7) == 1


def test_top_k_scopes() -> None:
    a, b = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([4.0, -6.0])
    one, two = TopK(k=2, scope="global").compress([a, b])
    assert one.tolist() == [0, 0, 0, 5]
    assert two.tolist() == [0, -6]
    assert TopK(k=1, scope="block", block_size=2)(a).tolist() == [3, 0, 0, 5]
    assert TopK(k=1, scope="block", block_size=3)(a).tolist() == [3, 0, 0, 5]


def test_top_k_orders_nan_above_infinity() -> None:
    x = torch.tensor([1.0, math.inf, math.nan])
    assert TopK(k=1)(x).isnan().tolist() == [False, False, True]


def test_ties_follow_memory() -> None:
    x = torch.ones(2, 2).t().contiguous().t()  # column-major
    kept = TopK(k=2)(x)
    assert kept.tolist() == [[1, 0], [1, 0]]


def test_scaled_sign() -> None:
    x = values(500, dtype=torch.float64)
    sent = ScaledSign()(x)
    lost = float((sent - x).square().sum())
    expected = float(x.square().sum() - x.abs().sum() ** 2 / 500)
    assert lost == pytest.approx(expected, rel=1e-12)
    assert ScaledSign()(torch.tensor([0.0, -0.0, -3.0])).tolist() == [1, 1, -1]
    one, two = ScaledSign(scope="global").compress([torch.ones(1), -4 * torch.ones(2)])
    assert one.tolist() == [3]
    assert two.tolist() == [-3, -3]


def test_natural_compression() -> None:
    compressor = NaturalCompression()
    powers = torch.ldexp(torch.ones(60), torch.arange(-30, 30))
    assert torch.equal(compressor(powers), powers)
    assert torch.equal(compressor(-powers), -powers)
    for dtype in (torch.float32, torch.float64):
        out = compressor(values(1000, dtype=dtype))
        mantissa, _ = torch.frexp(out)
        assert set(mantissa.abs().tolist()) == {0.5}
    top = torch.finfo(torch.float32).max
    extreme = torch.tensor([top, -top, math.inf, math.nan, 1e-42, 0.0])
    out = compressor(extreme)
    assert out[:3].tolist() == [2.0**127, -(2.0**127), math.inf]
    assert out[3].isnan()
    assert float(out[4]) in (0.0, 2.0**-126)
    assert out[5] == 0


def test_qsgd_levels() -> None:
    x = values(200, dtype=torch.float64)
    out = QSGD(3)(x) * 3 / x.norm()
    assert torch.allclose(out, out.round(), atol=1e-9)
    assert bool((out * x >= 0).all())


@pytest.mark.parametrize(
    ("compressor", "bits"),
    [
        (Identity(), 32000),
        (TopK(k=10), 10 * 42),
        (TopK(ratio=0.5), 1000 + 32 * 500),
        (TopK(k=1, scope="block", block_size=256), 3 * 40 + 40),
        (RandK(k=10), 320),
        (ScaledSign(), 1032),
        (QSGD(4), 32 + 4000),
        (QSGD(4, scope="block", block_size=300), 4 * 32 + 4000),
        (NaturalCompression(), 9000),
    ],
    ids=repr,
)
def test_bits(compressor: Compressor, bits: int) -> None:
    assert compressor.bits(1000) == bits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(), "either ratio or k"),
        (lambda: TopK(ratio=0.1, k=3), "either ratio or k"),
        (lambda: TopK(ratio=0.0), r"ratio must be in \(0, 1\]"),
        (lambda: TopK(ratio=1.5), r"ratio must be in \(0, 1\]"),
        (lambda: TopK(ratio=math.nan), r"ratio must be in \(0, 1\]"),
        (lambda: TopK(k=0), "k must be an integer of at least 1"),
        (lambda: TopK(k=True), "k must be an integer"),
        (lambda: TopK(k=1, scope="row"), "scope must be one of tensor, global, block"),  # type: ignore[arg-type]
        (lambda: TopK(k=1, block_size=0), "block_size must be"),
        (lambda: RandK(k=1, seed=-1), "seed must be"),
        (lambda: ScaledSign(scope="block"), "scope must be"),  # type: ignore[arg-type]
        (lambda: HardThreshold(0), "threshold must be"),
        (lambda: HardThreshold(math.nan), "threshold must be"),
        (lambda: HardThreshold(True), "threshold must be"),
        (lambda: QSGD(4, scope="global"), "scope must be one of tensor, block"),
        (lambda: QSGD(4, block_size=0), "block_size must be an integer of at least 1"),
        (lambda: QSGD(0), "levels must be an integer of at least 1"),
        (lambda: QSGD(2**20 + 1), "levels must be at most 1048576"),
        (lambda: NaturalCompression(seed=2**64), "seed must be"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="scaled must be"):
        RandK(k=1, scaled=1)  # type: ignore[arg-type]


def test_order_of_elements() -> None:
    for x in (values(3, 4), values(3, 4).t(), values(2, 3, 4, 5).transpose(1, 3), values(6)[::2]):
        assert torch.equal(unflatten(x, flatten(x)), x)
    column = torch.arange(6.0).reshape(2, 3).t()
    assert flatten(column).tolist() == [0, 1, 2, 3, 4, 5]
