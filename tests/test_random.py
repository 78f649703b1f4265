"""What is drawn at random: the same on every backend, however work is shared out, and fair."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from battery import BACKENDS, advance, assert_same_bits, make_params, record_grads, set_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from pysmooth import (
    EF21,
    EF21SGD2M,
    EFSGD,
    QSGD,
    Clip21SGD2M,
    EF21Plus,
    NaturalCompression,
    TopK,
    _cpu,
)
from pysmooth.reference import random

Make = Callable[..., torch.optim.Optimizer]
SEED = 2**40 + 3  # both halves matter

# Those that take no sum: nothing keeps two backends from the same bits.
EXACT: dict[str, Make] = {
    "ef": lambda p, **k: EFSGD(p, 0.1, NaturalCompression(seed=SEED), **k),
    "ef momentum": lambda p, **k: EFSGD(
        p, 0.1, NaturalCompression(seed=SEED), momentum=0.9, weight_decay=0.01, **k
    ),
    "ef21": lambda p, **k: EF21(p, 0.1, NaturalCompression(seed=SEED), weight_decay=0.1, **k),
    "ef21 2m": lambda p, **k: EF21SGD2M(p, 0.1, NaturalCompression(seed=SEED), init="full", **k),
    "noise": lambda p, **k: Clip21SGD2M(p, 0.1, math.inf, 0.3, 0.5, 1.5, seed=SEED, **k),
}
SUMMING: dict[str, Make] = {
    "ef qsgd": lambda p, **k: EFSGD(p, 0.1, QSGD(200, seed=SEED), momentum=0.9, **k),
    "ef qsgd block": lambda p, **k: EFSGD(
        p, 0.1, QSGD(60, scope="block", block_size=64, seed=SEED), momentum=0.9, **k
    ),
    "ef21 qsgd block": lambda p, **k: EF21(
        p, 0.1, QSGD(60, scope="block", seed=SEED), eta=0.3, normalize=True, **k
    ),
    "ef21 plus qsgd block": lambda p, **k: EF21Plus(
        p, 0.1, QSGD(5, scope="block", block_size=8, seed=SEED), **k
    ),
    "ef21 qsgd": lambda p, **k: EF21(p, 0.1, QSGD(200, seed=SEED), eta=0.3, normalize=True, **k),
    "ef21 plus": lambda p, **k: EF21Plus(p, 0.1, QSGD(200, seed=SEED), eta=0.3, **k),
    "ef21 plus top-k": lambda p, **k: EF21Plus(p, 0.1, TopK(ratio=0.1), eta=0.3, **k),
    "norm ef21": lambda p, **k: EF21(p, 0.1, NaturalCompression(seed=SEED), normalize=True, **k),
    "clipped noise": lambda p, **k: Clip21SGD2M(p, 0.1, 2.0, 0.3, 0.5, 1.5, seed=SEED, **k),
}
EVERY = {**EXACT, **SUMMING}
SHAPES = ((130, 70), (33,), (), (0, 2), (257,), (40_000,), (3,), (5, 2))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), _cpu.isa()
    yield
    torch.set_num_threads(threads)
    _cpu.set_isa(isa)


def run(
    make: Make,
    params: Sequence[Parameter],
    backend: str = "cpu",
    rows: Sequence[Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Parameters and states after four steps."""
    optimizer = make(params, backend=backend)
    advance(optimizer, params, rows or record_grads(params, 4))
    return results(optimizer, params)


def results(optimizer: torch.optim.Optimizer, params: Sequence[Parameter]) -> list[Tensor]:
    held = [v for p in params for v in optimizer.state[p].values() if v.numel() > 0]
    return [*(p.detach() for p in params), *held]


# ---- the same bits everywhere --------------------------------------------------------------------


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_draw_what_eager_draws(make: Make, dtype: torch.dtype) -> None:
    fused, eager = (run(make, make_params(SHAPES, dtype), backend) for backend in BACKENDS)
    assert_same_bits(fused, eager)


@pytest.mark.parametrize("make", SUMMING.values(), ids=SUMMING.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_agree_with_eager_where_sums_differ(make: Make, dtype: torch.dtype) -> None:
    """To rounding; a draw that falls on the edge would be off by a level (none does here)."""
    fused, eager = (run(make, make_params(SHAPES, dtype), backend) for backend in BACKENDS)
    eps = torch.finfo(dtype).eps
    for a, b in zip(fused, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=32 * eps, atol=32 * eps)


@every
def test_any_number_of_threads_and_every_instruction_set(make: Make) -> None:
    def outcome() -> list[Tensor]:
        params = make_params(((300, 401), *SHAPES))
        return run(make, params, rows=record_grads(params, 2))

    expected = outcome()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_same_bits(outcome(), expected)
    for isa in _cpu.isa_levels():
        _cpu.set_isa(isa)
        assert_same_bits(outcome(), expected)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@settings(max_examples=15)
@given(n=st.integers(1, 1200), offset=st.integers(0, 5))
def test_any_length_and_address(make: Make, dtype: torch.dtype, n: int, offset: int) -> None:
    """An element's draw does not depend on the vectors and runs that it falls into."""
    isa = _cpu.isa()
    found = []
    for level, start in ((isa, 0), (isa, offset), ("baseline", offset)):
        _cpu.set_isa(level)
        p = Parameter(torch.zeros(n + start, dtype=dtype)[start:].copy_(torch.arange(n) / n))
        found.append(run(make, [p], rows=[[torch.arange(n, dtype=torch.float64) - n / 3]] * 2))
    _cpu.set_isa(isa)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def arranged(x: Tensor, how: str) -> Tensor:
    """The same numbers, lying in another way."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "every other":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    return x.clone()


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("of_param", ["plain", "transposed", "every other"])
@pytest.mark.parametrize("of_grad", ["transposed", "every other", "expanded"])
def test_layouts(make: Make, of_param: str, of_grad: str) -> None:
    """Elements are numbered as the parameter lies in memory, wherever its gradient lies."""

    def outcome(backend: str, of_grad: str) -> list[Tensor]:
        gen = torch.Generator().manual_seed(1)
        p = Parameter(arranged(torch.randn(60, 41, generator=gen), of_param))
        row = torch.randn(60, 1, generator=gen).expand(60, 41)
        optimizer = make([p], backend=backend)
        for _ in range(2):
            p.grad = row if of_grad == "expanded" else arranged(row, of_grad)
            optimizer.step()
        return [t.contiguous() for t in results(optimizer, [p])]

    expected = outcome("cpu", "plain")
    assert_same_bits(outcome("cpu", of_grad), expected)
    assert_same_bits(outcome("eager", of_grad), expected)


@every_backend
@every
def test_resume(make: Make, backend: str) -> None:
    """A run that goes on draws what it would have drawn, also after a step that was skipped."""
    params = make_params(SHAPES)
    rows = record_grads(params, 6)
    expected = run(make, params, backend, rows)
    params = make_params(SHAPES)
    optimizer = make(params, backend=backend)
    advance(optimizer, params, rows[:3])
    spoilt = [torch.full_like(g, math.nan) for g in rows[3]]
    advance(optimizer, params, [spoilt])
    twins = [Parameter(p.detach().clone()) for p in params]
    other = make(twins, backend=backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(other, twins, rows[3:])
    assert_same_bits(results(other, twins), expected)


@every_backend
def test_draws_depend_on_seed_step_tensor_and_element(backend: str) -> None:
    def noise(seed: int, place: int = 0, steps: int = 1) -> Tensor:
        params = [Parameter(torch.zeros(n)) for n in (5, 50, 50)]
        optimizer = Clip21SGD2M(params, 1.0, 1.0, 1.0, 1.0, 1.0, seed=seed, backend=backend)
        for _ in range(steps):
            last = params[1 + place].detach().clone()
            set_grads(params, [torch.zeros_like(p) for p in params])
            optimizer.step()
        return last - params[1 + place].detach()

    one = noise(1)
    assert torch.equal(noise(1), one)  # another process, or rank, with this seed draws the same
    assert len(one.unique()) == 50
    for other in (noise(2), noise(1 + 2**32), noise(1, place=1), noise(1, steps=2)):
        assert int((other == one).sum()) < 3


# ---- fair ----------------------------------------------------------------------------------------


def sent(compressor: Any, x: Tensor, draws: int, backend: str) -> Tensor:
    """C(x), drawn again and again by the steps of error feedback whose residual is wiped out."""
    p = Parameter(torch.zeros_like(x))
    optimizer = EFSGD([p], 1.0, compressor, backend=backend)
    found = []
    for _ in range(draws):
        with torch.no_grad():
            p.zero_()
        p.grad = x.clone()
        optimizer.step()
        found.append(-p.detach().clone())
        optimizer.state[p]["residual"].zero_()
    return torch.stack(found)


@every_backend
@pytest.mark.parametrize(
    "compressor",
    [
        QSGD(1, seed=4),
        QSGD(7, seed=4),
        QSGD(3, scope="block", block_size=64, seed=4),
        NaturalCompression(seed=5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unbiased_with_bounded_variance(compressor: Any, dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    draws = 1500
    found = sent(compressor, x, draws, backend).double()
    x = x.double()
    if isinstance(compressor, QSGD):
        blocks = torch.split(x, compressor.scale_block or 300)
        spacing = torch.cat([b.norm().expand(len(b)) for b in blocks]) / compressor.levels
        above = (x.abs() / spacing).frac()
    else:
        spacing = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)
        above = x.abs() / spacing - 1
    deviation = spacing * (above * (1 - above) / draws).sqrt()
    # A coordinate that hardly ever goes up does so in lumps.
    assert bool(((found.mean(dim=0) - x).abs() <= 5 * deviation + 5 * spacing / draws).all())
    variance = (found - x).square().sum(dim=1).mean()
    assert variance == pytest.approx(float(draws * deviation.square().sum()), rel=0.02)
    assert variance <= compressor.omega(300) * x.square().sum()


@every_backend
def test_natural_compression_is_a_coin_for_each_coordinate(backend: str) -> None:
    """Powers of two stay, what lies between them goes up as often as it should."""
    x = torch.tensor([1.0, 1.25, 1.5, -1.75, 0.0, -0.0]).repeat(20_000)
    (found,) = sent(NaturalCompression(seed=1), x, 1, backend)
    found = found.view(-1, 6)
    assert bool((found[:, 0] == 1).all())
    assert bool((found[:, 4:] == 0).all())
    for column, share in ((1, 0.25), (2, 0.5), (3, 0.75)):
        up = (found[:, column].abs() == 2).double()
        assert bool((found[:, column].abs()[up == 0] == 1).all())
        assert abs(float(up.mean()) - share) < 5 * math.sqrt(share * (1 - share) / 20_000)
    neighbours = (found[:-1, 2] - 1.5) * (found[1:, 2] - 1.5)
    assert abs(float(neighbours.mean())) < 5 * 0.25 / math.sqrt(20_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [4, 64, 1024, 16384])
@pytest.mark.parametrize("how", ["plain", "transposed", "every other"])
def test_blocks_with_exact_norms_have_the_same_bits_everywhere(
    dtype: torch.dtype, block_size: int, how: str
) -> None:
    """A quarter of each block is a power of two, the rest 0: neither sums nor roots are rounded."""
    place = torch.arange(4 * 16384 + 4096)
    x = torch.where(place % 4 == 1, (-2.0) ** (place // block_size % 5), 0.0).double()
    x = x.view(256, 272)
    compressor = QSGD(3, scope="block", block_size=block_size, seed=SEED)
    found = []
    for backend in BACKENDS:
        p = Parameter(torch.zeros(x.shape, dtype=dtype))
        optimizer = EFSGD([p], 0.5, compressor, backend=backend)
        p.grad = arranged(x.to(dtype), how)
        optimizer.step()
        found.append(results(optimizer, [p]))
    assert_same_bits(*found)
    message = compressor(0.5 * x.to(torch.promote_types(dtype, torch.float32)))
    assert_same_bits([found[0][0]], [(0 - message).to(dtype)])


@every_backend
def test_a_block_is_compressed_as_a_tensor_of_its_own_would_be(backend: str) -> None:
    """Its values are multiples of its own norm over the levels, next to what they stand for."""
    x = torch.randn(2500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x *= 10.0 ** (torch.arange(2500) // 512)
    (found,) = sent(QSGD(9, scope="block", block_size=512, seed=1), x, 1, backend)
    for block, c in zip(torch.split(x, 512), torch.split(found, 512), strict=True):
        steps = c / block.norm() * 9
        assert bool(((steps - steps.round()).abs() < 1e-9).all())
        assert bool(((steps - block / block.norm() * 9).abs() < 1 + 1e-9).all())
        assert torch.count_nonzero(steps.round()) > 10
    (tensor,) = sent(QSGD(9, seed=1), x[:512], 1, backend)
    torch.testing.assert_close(found[:512], tensor, rtol=1e-12, atol=0)


def test_block_sizes_that_the_cpu_backend_does_not_take() -> None:
    p = Parameter(torch.ones(10))
    optimizer = EFSGD([p], 0.1, QSGD(4, scope="block", block_size=1000), backend="cpu")
    p.grad = torch.ones(10)
    with pytest.raises(TypeError, match="block_size 1000 does not divide 32768"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(10))
    assert not optimizer.state[p]
    optimizer = EFSGD([p], 0.1, QSGD(4, scope="block", block_size=1000), backend="eager")
    optimizer.step()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_qsgd_at_the_ends_of_the_range(dtype: torch.dtype, backend: str) -> None:
    """Zeros, norms that are hardly finite, one coordinate, levels below the normal numbers."""
    info = torch.finfo(dtype)
    small = info.tiny * 4 if dtype == torch.float32 else 1e-150  # whose square is a number
    for case in ([0.0] * 5, [small] * 5, [info.max / 4, -info.max / 8], [-3.0, 0, 0]):
        x = torch.tensor(case, dtype=dtype)
        found = sent(QSGD(4, seed=1), x, 3, backend)
        level = (x / 4).norm() if x.abs().max() > 1 else (x * 2.0**100).norm() / 4 * 2.0**-100
        assert bool(((found - x).abs() <= level * 1.001).all())
        assert bool((found * x.sign() >= 0).all())
    assert found.tolist() == [[-3.0, 0, 0]] * 3
    nothing = sent(QSGD(4, seed=1), torch.full((5,), info.tiny / 4, dtype=dtype), 3, backend)
    assert torch.count_nonzero(nothing) == 0


# ---- normal numbers ------------------------------------------------------------------------------


def noise_of_a_step(n: int, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    p = Parameter(torch.zeros(n, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = Clip21SGD2M([p], 0.0, 1.0, 1.0, 1.0, noise_std=1.0, seed=11, backend=backend)
    optimizer.step()
    return optimizer.state[p]["server_estimate"]


@every_backend
def test_noise_is_normal(backend: str) -> None:
    n = 2_000_000
    z = noise_of_a_step(n, backend).double()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: 1 % of fair samples would be further off
    order = torch.special.ndtr(z.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((order - steps[:-1]).abs().max(), (order - steps[1:]).abs().max())
    assert float(distance) < 1.63 / math.sqrt(n)
    for bound in (2.0, 3.0, 4.0, 4.5):
        for tail in (z > bound, z < -bound):
            expected = n * float(torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64)))
            assert abs(int(tail.sum()) - expected) < 4 * math.sqrt(expected)
    assert float(z.abs().max()) < 6.7
    for lag in (1, 2, 3, 4, 16, 64):
        for power in (1, 2):
            centred = z if power == 1 else z.square() - 1
            product = float((centred[lag:] * centred[:-lag]).mean())
            assert abs(product) < 4 * (2 if power == 2 else 1) / math.sqrt(n)


def test_noise_has_the_same_numbers_in_every_precision() -> None:
    wide = noise_of_a_step(5000, "cpu", torch.float64)
    assert torch.equal(noise_of_a_step(5000, "cpu").double(), wide)


def test_polynomials_of_the_normal_numbers() -> None:
    """Within 2e-7 of the radius, of what exact functions give for the same words."""
    n = 400_000
    pairs = random.words(n, seed=3, step=1, tensor_id=2).view(-1, 2)
    # In the words' corners as well.
    corners = torch.tensor([0, 1, 2, 2**29, 2**29 - 1, 2**31 - 1, 2**31, 2**32 - 1, 3 << 29])
    pairs = torch.cat([pairs, torch.cartesian_prod(corners, corners)])
    u = ((pairs[:, 0] >> 1).float() + 0.5).double() * 2.0**-31
    radius = (-2 * u.log()).sqrt()
    angle = pairs[:, 1].double() * (2 * math.pi * 2.0**-32)
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    error = (random.box_muller(pairs).double() - exact).abs()
    assert bool((error <= 2e-7 * radius[:, None]).all())
