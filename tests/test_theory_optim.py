"""Step sizes of the theory, against the formulas in plain float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from theory_problems import BACKENDS, THEORY, backward, quartic, start

from pysmooth.optim import (
    L0L1GD,
    STM,
    AdagradNorm,
    AdGD,
    AdSGD,
    ClipSGD,
    CoordinateDescent,
    OrderOracleCD,
    PolyakSGD,
    TheoryClipSGD,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_l0l1gd_is_from_smoothness_and_never_rises(backend):
    x, y = start(), start()
    a = L0L1GD([x], 4.0, 3.0, 0.28, backend=backend)
    b = ClipSGD.from_smoothness([y], 4.0, 3.0, 0.28, backend=backend)
    last = math.inf
    for _ in range(30):
        loss = float(backward(x))
        backward(y)
        assert loss <= last
        last = loss
        a.step()
        b.step()
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_polyak_is_the_formula(backend):
    x, want = start(), start().detach()
    optimizer = PolyakSGD([x], max_step=0.5, backend=backend)
    for _ in range(20):
        loss = backward(x)
        size = min(float(loss) / float(x.grad.norm()) ** 2, 0.5)
        want = want - size * 4 * (want**2).sum() * want
        optimizer.step(loss=loss)
        torch.testing.assert_close(x.detach(), want, rtol=1e-9, atol=0)


def test_polyak_groups_are_independent_runs():
    xs = [start(), torch.nn.Parameter(start().detach() * 2)]
    alone = [torch.nn.Parameter(x.detach().clone()) for x in xs]
    together = PolyakSGD([{"params": [x]} for x in xs], scope="group")
    each = [PolyakSGD([x]) for x in alone]
    for _ in range(5):
        together.step(loss=[backward(x) for x in xs])
        for x, o in zip(alone, each, strict=True):
            o.step(loss=backward(x))
    assert all(torch.equal(x, y) for x, y in zip(xs, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adgd_is_the_formula(backend):
    x = start()
    optimizer = AdGD([x], 1e-3, backend=backend)
    w, before, grad_before, size, ratio = start().detach(), None, None, None, math.inf
    for _ in range(30):
        backward(x)
        optimizer.step()
        g = 4 * (w**2).sum() * w
        if before is None:
            size = 1e-3
        else:
            new = 0.5 * float((w - before).norm() / (g - grad_before).norm())
            new = min(new, math.sqrt(1 + ratio) * size)
            ratio, size = new / size, new
        before, grad_before, w = w, g, w - size * g
        torch.testing.assert_close(x.detach(), w, rtol=1e-7, atol=1e-12)


def test_adgd_resumes_to_the_bit():
    x = start()
    optimizer = AdGD([x], 1e-3)
    for _ in range(4):
        backward(x)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    y = torch.nn.Parameter(x.detach().clone())
    other = AdGD([y], 1e-3)
    other.load_state_dict(saved)
    for _ in range(4):
        backward(x)
        optimizer.step()
        backward(y)
        other.step()
    assert torch.equal(x, y)


def test_skipped_step_leaves_the_numbers():
    x = start()
    optimizer = AdGD([x], 1e-3, nonfinite="skip")
    for _ in range(3):
        backward(x)
        optimizer.step()
    group, point = dict(optimizer.param_groups[0]), x.detach().clone()
    x.grad = torch.full_like(x, math.nan)
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    assert torch.equal(x, point)
    assert optimizer.param_groups[0]["step_size"] == group["step_size"]
    assert optimizer.param_groups[0]["ratio"] == group["ratio"]


def test_adsgd_on_one_batch_is_the_formula():
    x = start()
    optimizer = AdSGD([x], 1e-3)
    w, before, size, ratio = start().detach(), None, 1e-3, 1.0
    for _ in range(10):
        optimizer.step(lambda: backward(x))
        g = 4 * (w**2).sum() * w
        if before is not None:
            changed = (g - 4 * (before**2).sum() * before).norm()
            new = float((w - before).norm() / changed)
            new = min(new, math.sqrt(1 + 0.02 * ratio) * size) + 1e-5
            ratio, size = new / size, new
        before, w = w, w - size * g
        torch.testing.assert_close(x.detach(), w, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("variant", ["max", "plain"])
def test_stm_is_the_formula_and_keeps_its_bound(variant):
    x = start()
    radius = float(x.detach().norm())
    eta = 0.28
    optimizer = STM([x], 4.0, 3.0, eta, variant=variant)
    y = z = start().detach()
    total, curvature = 0.0, 0.0
    for k in range(40):
        backward(x)
        optimizer.step()
        alpha = eta * (k + 2) / 2
        at = (total * y + alpha * z) / (total + alpha)
        g = 4 * (at**2).sum() * at
        own = 4 + 3 * float(g.norm())
        curvature = max(curvature, own) if variant == "max" else own
        z = z - alpha / curvature * g
        y = (total * y + alpha * z) / (total + alpha)
        total += alpha
        torch.testing.assert_close(optimizer.solution()[0], y, rtol=1e-8, atol=1e-12)
    if variant == "max":
        bound = 2 * 4 * (1 + 3 * radius * math.exp(3 * radius)) * radius**2 / (eta * 40 * 43)
        assert float(quartic(y)) <= bound


@pytest.mark.parametrize("rule", ["standard", "implicit", "adaptive"])
def test_theory_rules_without_second_sample_are_known_optimizers(rule):
    x, y = start(), start()
    a = ClipSGD.from_theory([x], **THEORY, rule=rule, double_sampling=False, lr=0.7)
    c, eta, noise = TheoryClipSGD.constants(a.param_groups[0])
    b = {
        "standard": lambda: ClipSGD([y], 0.7 * eta, max_norm=c, clip_eps=0.0),
        "implicit": lambda: ClipSGD.from_smoothness([y], 4.0 + noise, 3.0, 0.7),
        "adaptive": lambda: AdagradNorm([y], 1.4, b_init=math.sqrt(1e-3), max_norm=c),
    }[rule]()
    for _ in range(10):
        backward(x)
        backward(y)
        a.step()
        b.step()
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-9, atol=1e-12)


def test_second_sample_decides_and_average_keeps_unclipped_points():
    x = start()
    optimizer = TheoryClipSGD([x], **THEORY, average=True)
    c, eta, _ = optimizer.constants(optimizer.param_groups[0])
    first = x.detach().clone()
    points = []
    for h in (2 * c, 0.5 * c, 0.1 * c):
        x.grad = torch.zeros_like(x)
        x.grad[0] = h
        optimizer.take_sample()
        before = x.detach().clone()
        x.grad = torch.ones_like(x)
        optimizer.step()
        torch.testing.assert_close(x.detach(), before - eta * min(1.0, c / h))
        points += [before] if h <= c else []
        want = torch.stack(points).mean(0) if points else first
        torch.testing.assert_close(optimizer.averaged()[0], want)
    with pytest.raises(ValueError, match="second sample"):
        optimizer.step()


def test_coordinate_descent_is_linear_where_l0_is_0():
    a = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))

    def closure():
        return backward(x, lambda v: torch.nn.functional.softplus(-(a @ v)))

    optimizer = CoordinateDescent([x], 0.0, [a.abs()], seed=5)
    losses = []
    for _ in range(60):
        before = x.detach().clone()
        losses.append(float(optimizer.step(closure)))
        assert int((x.detach() != before).sum()) <= 1
    assert losses[-1] < 1e-12 * losses[0]


def test_order_oracle_needs_only_the_order():
    ends = []
    for shape in (lambda f: f, torch.exp):
        x = torch.nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))
        optimizer = OrderOracleCD([x], seed=2, tol=1e-3)
        for _ in range(8):
            optimizer.step(lambda x=x, shape=shape: shape(((x - 0.25) ** 2).sum()))
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)
    assert float((ends[0] - 0.25).abs().max()) < 1e-3


@pytest.mark.parametrize(("expand", "off"), [(True, 0.0), (False, 37.0)])
def test_a_bracket_may_grow_until_it_holds_the_minimum(expand, off):
    x = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = OrderOracleCD([x], bracket=3.0, tol=1e-3, expand=expand)
    optimizer.step(lambda: (x - 40.0).square().sum())
    assert float((x.detach() - 40.0).abs()) == pytest.approx(off, abs=1e-3)


def test_golden_section_leaves_the_point_when_the_loss_raises():
    x = start()
    before = x.detach().clone()

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        OrderOracleCD([x]).step(fails)
    assert torch.equal(x, before)
