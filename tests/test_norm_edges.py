"""Norms where sums go wrong: at the ends of the range, at block borders, over many elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import pysmooth
from pysmooth import _cpu

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Around the lanes (64), the blocks (8192) and the chunks (32768) that a tensor is summed in.
BORDERS = sorted(
    {1, 2, 7, 8, 9, 15, 16, 17}
    | {b * k + d for b in (64, 4096, 8192, 32768) for k in (1, 2) for d in (-1, 0, 1)}
    | {3 * 32768 + 5}
)


@pytest.fixture(params=_cpu.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def norm(x: Tensor | list[Tensor], norm_type: float = 2.0) -> float:
    """The norm before it is rounded to float32. One thread: no waiting for others in small sums."""
    return float(_cpu.grad_norm(x if isinstance(x, list) else [x], norm_type, 1)[0])


def truth(x: Tensor, norm_type: float) -> float:
    return float(torch.linalg.vector_norm(x.double(), norm_type))


# ---- every element, once -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_element_counts_once(isa: str, dtype: torch.dtype) -> None:
    # Sums of small integers are exact: one element lost, or summed twice, would show.
    whole = torch.randint(1, 9, (BORDERS[-1],)).to(dtype) * torch.randint(0, 2, (1,)).mul(2).sub(1)
    for n in BORDERS:
        x = whole[:n]
        wide = x.double()
        assert norm(x, 1.0) == wide.abs().sum(), n
        assert norm(x, 2.0) == math.sqrt(wide.square().sum()), n
        assert norm(x, 0.0) == 1.0, n  # like torch: the tensors that are not all zero
        assert norm(x, math.inf) == wide.abs().max(), n
        assert norm(x, -math.inf) == wide.abs().min(), n
        assert norm(x, 3.0) == pytest.approx(float((wide.abs() ** 3).sum()) ** (1 / 3)), n


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [65, 8193, 32_770])
def test_one_element_anywhere(isa: str, size: int, dtype: torch.dtype) -> None:
    places = {0, 1, 7, 63, 64, size // 2, 8191, 8192, 32767, 32768, size - 2, size - 1}
    x = torch.zeros(size, dtype=dtype)
    for at in sorted(p for p in places if p < size):
        x.zero_()
        x[at] = -3
        assert norm(x, 0.0) == 1.0, at
        assert [norm(x, order) for order in (1.0, 2.0, math.inf)] == [3.0] * 3, at
        assert norm(x, -math.inf) == 0.0
        x.fill_(-3)
        x[at] = 0.5
        assert norm(x, -math.inf) == 0.5, at
        assert norm(x, math.inf) == 3.0


@pytest.mark.parametrize("size", [1, 63, 65, 8193])
def test_padding_of_a_tail_is_no_element(isa: str, size: int) -> None:
    x = torch.full((size,), 7.0)
    assert norm(x, -math.inf) == 7.0
    assert norm(x, -2.0) == pytest.approx(7.0 / math.sqrt(size))
    assert norm(torch.full((size,), math.inf), -math.inf) == math.inf


# ---- infinities and NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, 3.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_at_every_border(isa: str, dtype: torch.dtype, order: float) -> None:
    for size in (1, 9, 64, 65, 129, 4097, 8192, 8193, 32769):
        for at in {0, size // 2, size - 1} | {b for b in (63, 64, 8191, 8192, 32768) if b < size}:
            for bad in (math.nan, math.inf, -math.inf):
                if size > 100 and order in (3.0, 0.5) and at != size - 1:
                    continue  # powers are slow
                x = torch.ones(size, dtype=dtype)
                x[at] = bad
                got = norm(x, order)
                assert math.isnan(got) if math.isnan(bad) else got == math.inf, (size, at, bad)


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("positions", [(3, 90), (90, 3), (3, 20_000), (20_000, 3), (40_000, 3)])
def test_nan_beside_infinity_is_nan(isa: str, positions: tuple[int, int], order: float) -> None:
    x = torch.ones(40_001)
    x[positions[0]], x[positions[1]] = math.nan, math.inf
    assert math.isnan(norm(x, order))
    assert math.isnan(norm([x[:100], torch.full((3,), math.inf), x], order))


@pytest.mark.parametrize("order", [-math.inf, 0.0, -1.0, math.inf, 2.0, 0.5])
@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 2.0), (math.inf, math.nan, 0.0)])
def test_small_lists_as_torch(isa: str, values: tuple[float, ...], order: float) -> None:
    x = torch.tensor(values)
    got = pysmooth.get_total_norm([x, torch.ones(70)], order)
    expected = torch.nn.utils.get_total_norm([x, torch.ones(70)], order)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(3e38, torch.float32), (1e300, torch.float64), (3e38, torch.bfloat16), (6e4, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, 4.0])
def test_an_overflowing_sum_is_no_nonfinite_gradient(
    value: float, dtype: torch.dtype, order: float
) -> None:
    p = torch.nn.Parameter(torch.zeros(100, dtype=dtype))
    p.grad = torch.full((100,), value, dtype=dtype)
    optimizer = pysmooth.ClipSGD([p], 1e-30, nonfinite="skip", norm_type=order, backend="cpu")
    optimizer.step()
    assert optimizer.skipped_steps() == 0


# ---- the ends of the range -----------------------------------------------------------------------

TINY = torch.finfo(torch.float32).smallest_normal
EXTREMES: dict[str, Callable[[], Tensor]] = {
    "1e30": lambda: torch.randn(50_000) * 1e30,
    "1e-30": lambda: torch.randn(50_000) * 1e-30,
    "1e-22, whose squares are subnormal": lambda: torch.randn(50_000) * 1e-22,
    "subnormals": lambda: torch.randn(50_000) * TINY / 8,
    "smallest subnormal": lambda: torch.full((50_000,), 1e-45),
    "one huge among small": lambda: torch.cat([torch.full((30_000,), 1e-3), torch.tensor([1e25])]),
    "one large among small": lambda: torch.cat([torch.rand(30_000) * 1e-3, torch.tensor([10.0])]),
    "blocks of different scale": lambda: torch.cat(
        [torch.randn(8192) * s for s in (1e-30, 1.0, 1e-25, 1e-10)]
    ),
    "a vanishing block after a huge one": lambda: torch.cat(
        [torch.randn(8192) * s for s in (1e30, 1e-30)]
    ),
    "heavy tail": lambda: torch.randn(50_000).mul(8).exp(),
    "zeros with one subnormal": lambda: torch.cat([torch.zeros(9000), torch.tensor([1e-45])]),
    "bfloat16 at its largest": lambda: torch.full((9000,), 3.38e38).bfloat16(),
    "bfloat16 subnormals": lambda: torch.full((9000,), 1e-40).bfloat16(),
    "float16 at its largest": lambda: torch.full((9000,), 65504.0).half(),
    "float16 subnormals": lambda: torch.full((9000,), 6e-8).half(),
    "float64, 1e150": lambda: torch.randn(9000).double() * 1e150,
    "float64, 1e-150": lambda: torch.randn(9000).double() * 1e-150,
    "float64 beyond float32": lambda: torch.randn(9000).double() * 1e50,
}


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, -math.inf, 0.5, 3.0])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(isa: str, name: str, order: float) -> None:
    x = EXTREMES[name]()
    if order == 3.0 and "float64, 1e" in name:
        pytest.skip("cubes leave float64, in torch as well")
    expected = truth(x, order)
    assert expected != 0 or order == -math.inf
    assert norm(x, order) == pytest.approx(expected, rel=2e-7, abs=0)


@pytest.mark.parametrize("value", [1e200, 1e-200])
def test_float64_squares_that_leave_float64_do_as_in_torch(value: float) -> None:
    x = torch.full((9,), value, dtype=torch.float64)
    assert norm(x) == float(torch.linalg.vector_norm(x))
    assert norm(x, math.inf) == value
    assert norm(x, 1.0) == pytest.approx(9 * value)


def test_zeros(isa: str) -> None:
    x = torch.zeros(40_001)
    x[::2] = -0.0
    for order in (2.0, 1.0, math.inf, -math.inf, 0.0, 0.5, 3.0):
        assert norm(x, order) == 0.0
        assert math.copysign(1, norm(x, order)) == 1
    assert norm(x, -1.0) == truth(x, -1.0)


def test_a_norm_beyond_float32_still_clips_right() -> None:
    p = torch.nn.Parameter(torch.zeros(16))
    p.grad = torch.full((16,), 3e38)
    assert pysmooth.clip_grad_norm_([p], 1.0) == math.inf  # as a float32
    torch.testing.assert_close(p.grad, torch.full((16,), 0.25))


# ---- accuracy ------------------------------------------------------------------------------------

MILLION: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(1_000_000),
    "uniform": lambda: torch.rand(1_000_000) + 0.1,
    "growing": lambda: torch.linspace(0, 1, 1_000_000),
    "heavy tail": lambda: torch.randn(1_000_000).mul(3).exp(),
    "sparse": lambda: torch.randn(1_000_000) * (torch.rand(1_000_000) < 1e-3),
    "bfloat16": lambda: torch.randn(1_000_000).bfloat16(),
    "float16": lambda: torch.randn(1_000_000).half(),
}


@pytest.mark.parametrize("order", [2.0, 1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", MILLION)
def test_a_million_elements(name: str, order: float) -> None:
    x = MILLION[name]()
    expected = truth(x, order)
    assert float(pysmooth.get_total_norm([x], order)) == pytest.approx(expected, rel=2e-7)
    pieces = list(x.split(4099))
    assert float(pysmooth.get_total_norm(pieces, order)) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1.1])
@pytest.mark.parametrize("order", [2.0, 1.0])
def test_rounding_errors_that_add_up_stay_bounded(value: float, order: float) -> None:
    # Equal elements round the same way in every lane. A lane adds up 128 of them in float32, so the
    # error is bounded by that of 127 roundings of 2^-24, whatever the size of the tensor.
    bound = 127 * 2**-24
    for n in (8192, 1_000_000):
        x = torch.full((n,), value)
        assert norm(x, order) == pytest.approx(truth(x, order), rel=bound, abs=0)


def test_float64_is_summed_in_float64() -> None:
    x = torch.randn(1_000_000, dtype=torch.float64)
    for order in (2.0, 1.0, 3.0):
        assert norm(x, order) == pytest.approx(truth(x, order), rel=1e-13)
    # Far below the resolution of a float32.
    x = torch.tensor([1.0, 1e-10, 1e-10], dtype=torch.float64)
    assert norm(x, 1.0) == 1.0 + 2e-10


# ---- count, minimum, powers ----------------------------------------------------------------------


def test_count_is_of_elements_per_tensor_and_of_tensors_in_all() -> None:
    tensors = [torch.zeros(5), torch.tensor([0.0, -0.0, 1e-45, 2.0]), torch.ones(70_000)]
    assert pysmooth.get_total_norm(tensors, 0.0) == torch.nn.utils.get_total_norm(tensors, 0.0)
    assert norm(tensors, 0.0) == 2.0


@pytest.mark.parametrize("order", [0.25, 0.5, 1.5, 3.0, 7.0, 20.0, -0.5, -1.0, -2.0, -3.0])
def test_powers(isa: str, order: float) -> None:
    x = torch.rand(10_000) + 0.5
    tensors = [x[:9000], x[9000:9001], x[9001:]]
    expected = pytest.approx(truth(x, order), rel=1e-9)
    assert norm(x, order) == expected
    assert norm(tensors, order) == expected


def test_minimum_over_tensors() -> None:
    tensors = [torch.full((70,), -4.0), torch.empty(0), torch.full((9000,), 3.0), torch.tensor(5.0)]
    assert norm(tensors, -math.inf) == 3.0
    tensors[2][8999] = 0.25
    assert norm(tensors, -math.inf) == 0.25
    tensors[0][0] = math.nan
    assert math.isnan(norm(tensors, -math.inf))
