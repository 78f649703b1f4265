"""Estimates of smoothness and tails, where the truth is known."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from pysmooth.diagnostics import estimate_smoothness, estimate_tail, plot_smoothness


def test_exponential_has_l0_zero_and_a_parabola_l1_zero():
    xs = [torch.tensor([2.0 - 0.01 * k], dtype=torch.float64) for k in range(300)]
    found = estimate_smoothness(xs, [x.exp() for x in xs])
    assert pytest.approx(1.0, rel=0.02) == found.L1
    assert found.L0 < 0.01
    found = estimate_smoothness(xs, [3 * x for x in xs])
    assert pytest.approx(3.0, rel=1e-6) == found.L0
    assert found.L1 < 1e-6


def test_picture_has_every_step_and_the_fitted_line(tmp_path):
    xs = [torch.tensor([2.0 - 0.01 * k], dtype=torch.float64) for k in range(50)]
    found = estimate_smoothness(xs, [x.exp() for x in xs])
    axes = plot_smoothness(found)
    assert plot_smoothness(found, axes) is axes  # into what is there
    offsets = axes.collections[0].get_offsets()
    assert torch.equal(torch.tensor(offsets), torch.stack([found.norms, found.local], 1))
    x, y = (torch.tensor(v) for v in axes.lines[0].get_data())
    torch.testing.assert_close(y, found.L0 + found.L1 * x)
    axes.figure.savefig(tmp_path / "smoothness.png")
    assert (tmp_path / "smoothness.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    xs = [torch.tensor([float(k)]) for k in range(4)]
    found = estimate_smoothness(xs, xs)
    with pytest.raises(ImportError, match=r"pysmooth\[bench\]"):
        plot_smoothness(found)


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
        (
            lambda: estimate_smoothness([torch.ones(1)] * 3, [torch.full((1,), math.inf)] * 3),
            "finite",
        ),
        (lambda: estimate_tail(torch.ones(3)), "norms"),
        (lambda: estimate_tail(torch.full((30,), math.nan)), "norms"),
        (lambda: estimate_tail(torch.ones(30), part=1.0), "part"),
        (lambda: estimate_tail(torch.eye(30)[0]), "tail"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
