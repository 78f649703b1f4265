"""The bounds that docs/numerics.md states, where no other test has them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from battery import advance, assert_same_snapshot, make_params, record_grads, same_bits, snapshot
from registry import REGISTRY
from torch import Tensor

import pysmooth
from pysmooth import _cpu

ROOT = Path(__file__).parents[1]
UNIT = 2**-24  # half a unit in the last place of a float32 between 1 and 2


@pytest.fixture(params=_cpu.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


# ---- sums against exact ones ---------------------------------------------------------------------

SIZE = 3 * 2**18 + 77
SUMS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda g: torch.randn(SIZE, generator=g),
    "equal, so that all roundings go one way": lambda _: torch.full((SIZE,), 1.0000001).div(3),
    "falling over 60 binary orders": lambda g: (
        torch.rand(SIZE, generator=g) * torch.logspace(30, -30, SIZE, base=2)
    ),
    "rising": lambda g: torch.rand(SIZE, generator=g) * torch.logspace(-30, 30, SIZE, base=2),
    "one among a million that vanish beside it": lambda g: (
        torch.rand(SIZE, generator=g).mul(1e-4).index_fill(0, torch.tensor([SIZE // 3]), 1e3)
    ),
    "squares that overflow": lambda g: torch.randn(SIZE, generator=g) * 1e30,
    "squares that vanish": lambda g: torch.randn(SIZE, generator=g) * 1e-30,
    "subnormal": lambda g: torch.randn(SIZE, generator=g) * 1e-40,
}


@pytest.mark.parametrize("name", SUMS)
def test_norms_against_exact_sums(name: str) -> None:
    """A lane adds up 128 terms in float32: 127 roundings, and one of each square; a root halves."""
    x = SUMS[name](torch.Generator().manual_seed(11))
    values = x.tolist()
    length = math.sqrt(math.fsum(v * v for v in values))
    total = math.fsum(map(abs, values))
    assert float(_cpu.grad_norm([x], 2.0, 2)[0]) == pytest.approx(length, rel=64 * UNIT, abs=0)
    assert float(_cpu.grad_norm([x], 1.0, 2)[0]) == pytest.approx(total, rel=127 * UNIT, abs=0)
    if 0 < length < 3e38:
        got = float(pysmooth.get_total_norm([x]))  # rounded to float32
        assert got == pytest.approx(length, rel=65 * UNIT, abs=2**-150)


def test_float64_norms_against_exact_sums() -> None:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    values = x.tolist()
    length, total = math.sqrt(math.fsum(v * v for v in values)), math.fsum(map(abs, values))
    bound = (128 + SIZE / 8192) * 2**-53
    assert float(_cpu.grad_norm([x], 2.0, 2)[0]) == pytest.approx(length, rel=bound, abs=0)
    assert float(_cpu.grad_norm([x], 1.0, 2)[0]) == pytest.approx(total, rel=bound, abs=0)


def test_means_of_signs_are_as_good() -> None:
    """The scale of scaled signs: the same lanes, in another pass."""
    x = SUMS["normal"](torch.Generator().manual_seed(13))
    p = torch.nn.Parameter(torch.zeros(SIZE))
    p.grad = x
    pysmooth.SignSGD([p], lr=1.0, scaled=True, backend="cpu").step()
    mean = math.fsum(map(abs, x.tolist())) / SIZE
    assert float(p.detach().abs().max()) == pytest.approx(mean, rel=128 * UNIT, abs=0)
    assert float(p.detach().abs().min()) == float(p.detach().abs().max())


# ---- one element ---------------------------------------------------------------------------------


def moved(p: Tensor, g: Tensor, lr: float) -> Tensor:
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g.clone()
    pysmooth.ClipSGD([parameter], lr, backend="cpu").step()
    return parameter.detach()


def test_products_are_rounded_before_they_are_added(isa: str) -> None:
    """No fused multiply-add: where one would give another number, two roundings are what comes."""
    generator = torch.Generator().manual_seed(14)
    p, g = torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    lr = 0.7310585
    step = torch.tensor(lr, dtype=torch.float32)
    apart = p - step * g
    fused = (p.double() - step.double() * g.double()).float()  # the product is exact
    assert int((fused != apart).sum()) > 1000
    assert torch.equal(moved(p, g, lr), apart)


def test_subnormal_numbers_are_kept(isa: str) -> None:
    unit = 2.0**-149
    p = torch.arange(-2000, 2000).double().mul(unit).float()
    g = torch.arange(4000).double().mul(unit).float()
    assert same_bits(moved(p, g, 1.0), (p.double() - g.double()).float())
    assert same_bits(moved(torch.zeros(4000), g, 1.0), 0.0 - g)
    for dtype, tiny in ((torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)):
        p16 = torch.arange(-100, 100).double().mul(tiny).to(dtype)
        g16 = torch.arange(200).double().mul(tiny).to(dtype)
        expected = (p16.double() - g16.double()).to(dtype)
        assert same_bits(moved(p16, g16, 1.0), expected)


def test_what_cancels_leaves_the_rounding_of_the_product(isa: str) -> None:
    """Errors are small beside what was there, not beside what is left."""
    generator = torch.Generator().manual_seed(15)
    g = torch.rand(10_000, generator=generator) + 0.5
    lr = float(torch.tensor(0.3))
    p = (lr * g.double()).float()  # nearest to the step
    left = moved(p, g, lr).double()
    exact = p.double() - lr * g.double()
    units = 2.0 ** (torch.frexp(p.double()).exponent.double() - 24)
    assert float(((left - exact).abs() / units).max()) <= 0.5
    assert int((left == 0).sum()) == 10_000  # all that is left is gone
    assert int((exact != 0).sum()) > 5000


# ---- kernels and plain torch ---------------------------------------------------------------------

# Variants without a norm or a mean, and of rules that divide by nothing.
TO_THE_BIT = {
    "clip_sgd": ("plain", "dampening", "value"),
    "sign_sgd": ("plain", "value"),
    "lion": ("plain",),
    "ef_sgd": (
        *("main", "top_k", "top_k_global", "top_k_block", "rand_k", "natural", "clip_value"),
        "absorb",
    ),
    "ef21": ("one_pass", "one_pass_momentum", "rand_k", "identity"),
    "ef21_sgd2m": ("main", "top_k"),
}


@pytest.mark.parametrize("name", TO_THE_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_are_eager_torch_to_the_bit(name: str, dtype: torch.dtype) -> None:
    entry = next(e for e in REGISTRY if e.name == name)
    for variant in TO_THE_BIT[name]:
        results = []
        for backend in ("cpu", "eager"):
            params = make_params(dtype=dtype)
            optimizer = entry.make(params, backend=backend, **entry.variants[variant])
            advance(optimizer, params, record_grads(params, 6))
            results.append(snapshot(optimizer))
        assert_same_snapshot(*results)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) > 20
    for file, function in named:
        text = (ROOT / "tests" / file).read_text()
        assert f"def {function}(" in text if function else text
