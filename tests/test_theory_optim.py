"""Step sizes of the theory, against the formulas in plain float64, and their errors."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

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
from pysmooth.optim.stm import NU

BACKENDS = ("cpu", "eager")


def quartic(x):
    return (x**2).sum() ** 2


def parabola(x):
    return (x**2).sum() / 2


def start(d=6):
    x = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return torch.nn.Parameter(x)


def backward(x, f=quartic):
    x.grad = None
    loss = f(x)
    loss.backward()
    return loss.detach()


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


THEORY = {"L0": 4.0, "L1": 3.0, "sigma": 0.5, "R0": 2.0, "T": 100}


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


def test_golden_section_leaves_the_point_when_the_loss_raises():
    x = start()
    before = x.detach().clone()

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        OrderOracleCD([x]).step(fails)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: PolyakSGD([x], math.inf), "f_star"),
        (lambda x: PolyakSGD([x], c=0.0), "c must"),
        (lambda x: PolyakSGD([x], scope="tensor"), "scope"),
        (lambda x: PolyakSGD([x], growth=0.5), "growth"),
        (lambda x: PolyakSGD([x], first_step=0.0), "first_step"),
        (lambda x: STM([x], 1.0, 0.0, amp="fused"), "amp must be one of external"),
        (lambda x: AdGD([x], -1.0), "lr"),
        (lambda x: AdGD([x], gamma=-1.0), "gamma"),
        (lambda x: AdSGD([x], damping=0.0), "damping"),
        (lambda x: STM([x], 0.0, 0.0), "L0 and L1"),
        (lambda x: STM([x], 1.0, 0.0, variant="best"), "variant"),
        (lambda x: L0L1GD([x], -1.0, 0.0), "L0"),
        (lambda x: TheoryClipSGD([x], **{**THEORY, "R0": 0.0}), "R0"),
        (lambda x: TheoryClipSGD([x], **THEORY, rule="best"), "rule"),
        (lambda x: CoordinateDescent([x], 0.0, 0.0), "L0 and L1"),
        (lambda x: CoordinateDescent([x], [torch.ones(2)], 0.0), "of its shape"),
        (lambda x: OrderOracleCD([x], tol=0.0), "tol"),
        (lambda x: PolyakSGD([x]).step(), "closure"),
        (lambda x: PolyakSGD([x]).step(loss=[1.0, 2.0]), "one value per group"),
        (lambda x: AdSGD([x]).step(), "closure"),
        (lambda x: CoordinateDescent([x], 1.0, 0.0).step(), "closure"),
        (lambda x: OrderOracleCD([x]).step(), "closure"),
    ],
)
def test_bad_input_names_the_argument(make, words):
    x = start()
    before = x.detach().clone()
    with pytest.raises(ValueError, match=words):
        make(x)
    assert torch.equal(x, before)


MAKES = {
    "polyak": lambda x: PolyakSGD([x]),
    "smoothed polyak": lambda x: PolyakSGD([x], growth=1.5, first_step=0.01),
    "adgd": lambda x: AdGD([x], 1e-3),
    "adsgd": lambda x: AdSGD([x], 1e-3),
    "stm": lambda x: STM([x], 4.0, 3.0, scope="group"),
    "coordinates": lambda x: CoordinateDescent([x], 4.0, [torch.full_like(x, 3.0)], seed=9),
    "order": lambda x: OrderOracleCD([x], seed=9, tol=1e-2),
}


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_copies_go_on_with_the_same_bits(name, how, dtype):
    """By closures, which some of them cannot do without."""
    x = torch.nn.Parameter(start().detach().to(dtype))
    optimizer = MAKES[name](x)
    for _ in range(3):
        optimizer.step(lambda: quartic_with_gradient(x))
    if how == "checkpoint":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        other = MAKES[name](torch.nn.Parameter(x.detach().clone()))
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    else:
        copied = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}
        other = copied[how](optimizer)
    y = other.param_groups[0]["params"][0]
    before = x.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: quartic_with_gradient(x))
        other.step(lambda: quartic_with_gradient(y))
    assert torch.equal(x, y)
    assert not torch.equal(x, before)


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


def quartic_with_gradient(x):
    x.grad = None
    with torch.enable_grad():
        loss = quartic(x)
        loss.backward()
    return loss.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mean", "error", "says"),
    [
        (None, TypeError, "state 'average' of parameter 'x' is not a tensor"),
        (
            torch.zeros(6, dtype=torch.float16),
            ValueError,
            "'average' of parameter 'x' is .*float16",
        ),
        (torch.zeros(5, dtype=torch.float64), ValueError, "'average' of parameter 'x' is .*shape"),
        (torch.zeros(1, dtype=torch.float64).expand(6), ValueError, "'average' .* overlaps itself"),
        ("parameter", ValueError, "'average' .* share memory"),
    ],
)
def test_a_mean_that_cannot_be_written_is_refused(mean, error, says, backend):
    x = start()
    optimizer = TheoryClipSGD(
        [("x", x)], **THEORY, double_sampling=False, average=True, backend=backend
    )
    for _ in range(2):
        optimizer.zero_grad()
        parabola(x).backward()
        optimizer.step()
    before = x.detach().clone()
    optimizer.state[x]["average"] = x.detach() if mean == "parameter" else mean
    with pytest.raises(error, match=says):
        optimizer.step()
    assert torch.equal(x, before)


def test_an_infinite_first_gradient_is_the_same_on_all_backends():
    states = []
    for backend in BACKENDS:
        x = start()
        optimizer = AdGD([x], backend=backend)
        x.grad = torch.full_like(x, math.inf)
        optimizer.step()
        assert x.isnan().all()
        states.append(optimizer.state[x]["scale"])
    assert all(scale.isnan() for scale in states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_empty_parameters_do_not_say_that_it_has_begun(backend):
    """Whether an empty parameter has states depends on when its first gradient came."""
    ends = []
    for keeps in (True, False):
        x, empty = start(), torch.nn.Parameter(torch.zeros(0, dtype=torch.float64))
        optimizer = STM([empty, x], 4.0, 3.0, backend=backend)
        empty.grad = torch.zeros_like(empty)
        optimizer.step()
        if not keeps:
            optimizer.state.clear()
        for _ in range(3):
            optimizer.zero_grad()
            quartic(x).backward()
            optimizer.step()
        ends.append((optimizer.param_groups[0]["k"], x.detach().clone()))
    assert ends[0][0] == ends[1][0] == 3
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_with_an_overflow_teaches_nothing(backend, first):
    x = start()
    optimizer = AdGD([x], backend=backend)
    for overflow in (*(() if first else (0.0,)), 1.0):
        before, point = dict(optimizer.param_groups[0]), x.detach().clone()
        x.grad = 2 * x.detach()
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(overflow)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    assert torch.equal(x, point)
    assert optimizer.param_groups[0] == before
