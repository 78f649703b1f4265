"""Steps of the theory: bad input, copies, and states that cannot be."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from theory_problems import BACKENDS, THEORY, parabola, quartic, quartic_with_gradient, start

from pysmooth.optim import (
    L0L1GD,
    STM,
    AdGD,
    AdSGD,
    CoordinateDescent,
    OrderOracleCD,
    PolyakSGD,
    TheoryClipSGD,
)


def spoil(x):
    x.grad = torch.full_like(x, math.nan)


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
        (lambda x: CoordinateDescent([x], [-torch.ones(6)], 0.0), "L0 must be at least 0 everywh"),
        (lambda x: CoordinateDescent([torch.nn.Parameter(x[:0])], 1.0, 0.0), "no coordinate"),
        (lambda x: CoordinateDescent([x], 1.0, 0.0).step(lambda: 0.0), "has no gradient"),
        (lambda x: CoordinateDescent([x], 1.0, 0.0).step(lambda: spoil(x)), "0 is not finite"),
        (lambda x: TheoryClipSGD([x], **THEORY).averaged(), "average=False"),
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
