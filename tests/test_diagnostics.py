"""Estimates of smoothness and tails, where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from pysmooth.diagnostics import estimate_smoothness, estimate_tail


def test_exponential_has_l0_zero_and_a_parabola_l1_zero():
    xs = [torch.tensor([2.0 - 0.01 * k], dtype=torch.float64) for k in range(300)]
    found = estimate_smoothness(xs, [x.exp() for x in xs])
    assert pytest.approx(1.0, rel=0.02) == found.L1
    assert found.L0 < 0.01
    found = estimate_smoothness(xs, [3 * x for x in xs])
    assert pytest.approx(3.0, rel=1e-6) == found.L0
    assert found.L1 < 1e-6


@pytest.mark.parametrize("index", [1.5, 3.0])
def test_tail_index_of_pareto(index):
    u = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimate_tail(u ** (-1 / index))
    assert found.tail_index == pytest.approx(index, rel=0.1)
    assert found.extreme > 100


def test_a_normal_sample_has_no_extreme_outliers():
    x = 10 + torch.randn(2000000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimate_tail(x)
    assert found.mild == pytest.approx(1.0, abs=0.05)
    assert found.extreme < 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: estimate_smoothness([torch.ones(1)] * 2, [torch.ones(1)] * 2), "three"),
        (lambda: estimate_smoothness([torch.ones(1)] * 3, [torch.ones(2)] * 3), "shapes"),
        (lambda: estimate_smoothness([torch.ones(1)] * 3, [torch.ones(1)] * 3), "moved"),
        (lambda: estimate_tail(torch.ones(3)), "norms"),
        (lambda: estimate_tail(torch.full((30,), math.nan)), "norms"),
        (lambda: estimate_tail(torch.ones(30), part=1.0), "part"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
