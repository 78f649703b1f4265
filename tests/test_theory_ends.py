"""Steps of the theory end where the theory says: known factors, bounds, single steps."""

from __future__ import annotations

import math

import pytest
import torch
from theory_problems import BACKENDS, backward, parabola, quartic, start

from pysmooth.optim import (
    L0L1GD,
    AdGD,
    CoordinateDescent,
    OrderOracleCD,
    PolyakSGD,
)
from pysmooth.optim.stm import NU

A = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.5], dtype=torch.float64)
FACTORS = {
    "(0, ||a||)": (
        lambda x: (A @ x).exp(),
        lambda x, **kwargs: L0L1GD(x, 0.0, float(A.norm()), **kwargs),
        math.exp(-1),
    ),
    "L1 = 0 is 1 / L": (
        lambda x: 1.5 * (x**2).sum(),
        lambda x, **kwargs: L0L1GD(x, 3.0, 0.0, 0.5, **kwargs),
        0.25,
    ),
    "Polyak, ||x||^2": (lambda x: (x**2).sum(), PolyakSGD, 0.25),
    "Polyak, ||x||^4": (quartic, PolyakSGD, 0.75**4),
    "Polyak, c = 1/2": (quartic, lambda x, **kwargs: PolyakSGD(x, c=0.5, **kwargs), 0.5**4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FACTORS)
def test_the_loss_falls_by_a_known_factor(name, backend):
    f, make, factor = FACTORS[name]
    x = start()
    optimizer = make([x], backend=backend)
    last = None
    for _ in range(8):
        loss = float(optimizer.step(lambda: backward(x, f)))
        assert last is None or loss == pytest.approx(factor * last, rel=1e-9)
        last = loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_adgd_finds_the_curvature_of_a_parabola(backend):
    """||dx|| / ||dg|| = 1 / 3, gamma of it."""
    x = start()
    optimizer = AdGD([x], 1e-3, gamma=0.25, backend=backend)
    for _ in range(3):
        backward(x, lambda v: 1.5 * (v**2).sum())
        optimizer.step()
    assert optimizer.param_groups[0]["step_size"] == pytest.approx(0.25 / 3, rel=1e-9)


def test_what_the_theory_of_l0l1gd_says():
    """arXiv:2409.14989: loss, gradient and distance do not grow; few steps have large gradients."""
    x, eta = start(), NU / 2
    radius = float(x.detach().norm())
    optimizer = L0L1GD([x], 4.0, 3.0, eta)
    last, large, steps = (math.inf,) * 3, 0, 400
    for _ in range(steps):
        now = (float(backward(x)), float(x.grad.norm()), float(x.detach().norm()))
        assert all(a <= b for a, b in zip(now, last, strict=True))
        last, large = now, large + (now[1] >= 4 / 3)
        optimizer.step()
    assert 0 < large <= 8 * 9 * radius**2 / (eta * NU)
    assert last[0] <= 2 * 4 * radius**2 / (eta * steps)


def test_smoothed_polyak_is_the_formula():
    """arXiv:2002.10542's experiments: at most 2^(b/n) of the step before; a zero gradient waits."""
    x = start()
    optimizer = PolyakSGD([x], c=0.5, growth=2**0.25, first_step=1e-3, eps=1e-8)
    size = 1e-3
    for _ in range(20):
        loss, before = backward(x), x.detach().clone()
        size = min(2**0.25 * size, float(loss) / (0.5 * float(x.grad.norm()) ** 2 + 1e-8))
        optimizer.step(loss=loss)
        torch.testing.assert_close(x.detach(), before - size * x.grad, rtol=1e-9, atol=1e-12)
    x.grad = torch.zeros_like(x)
    optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["step_size"] == 0
    backward(x)
    optimizer.step(loss=1e6)
    assert optimizer.param_groups[0]["step_size"] == pytest.approx(2**0.25 * size)


def test_coordinate_descent_ends_a_separable_parabola_in_a_step_per_coordinate():
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    x = start()
    optimizer = CoordinateDescent([x], [weights], 0.0, seed=3)
    for _ in range(60):
        optimizer.step(lambda: backward(x, lambda v: (weights * v**2).sum() / 2))
    assert float(x.detach().abs().max()) < 1e-15


def test_groups_of_coordinate_methods():
    x, y = start(), start()

    def closure():
        with torch.enable_grad():
            return backward(x, parabola) + backward(y, parabola)

    for optimizer in (CoordinateDescent([x], 1.0, 0.0), OrderOracleCD([x], tol=1e-3)):
        optimizer.add_param_group({"params": [y]})
        seen = set()
        for _ in range(20):
            before = [p.detach().clone() for p in (x, y)]
            optimizer.step(closure)
            seen |= {i for i, p in enumerate((x, y)) if not torch.equal(p, before[i])}
        assert seen == {0, 1}
        with pytest.raises(ValueError, match="contiguous"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 3).T)]})
        assert len(optimizer.param_groups) == 2
    listed = CoordinateDescent([x], [torch.ones_like(x)], 0.0)
    with pytest.raises(ValueError, match="L0 or L1 is a list"):
        listed.add_param_group({"params": [y]})
    assert len(listed.param_groups) == 1
