"""The norm versions of AdaGrad and Adam against their formulas; one number per scope unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from battery import BACKENDS, advance, make_params, record_grads, set_grads
from torch import Tensor

from pysmooth import AdagradNorm, AdamDNorm, AdamNorm, ClipRAdaGradD, MAdagradNorm

every_backend = pytest.mark.parametrize("backend", BACKENDS)
F64 = torch.float64


def clipped(row: list[Tensor], units: list[list[int]], bound: float) -> list[Tensor]:
    out = list(row)
    for unit in units:
        norm = torch.stack([row[i].norm() for i in unit]).norm()
        for i in unit:
            out[i] = row[i] * min(1.0, bound / float(norm))
    return out


@every_backend
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_formula(kind: str, scope: Any, delayed: bool, backend: str) -> None:
    params = make_params([(30,), (4, 5), (6,)], F64)
    plain = [p.detach().clone() for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    common: dict[str, Any] = {
        "b_init": 0.7,
        "reweight": 0.4,
        "delayed": delayed,
        "max_norm": 1.0,
        "weight_decay": 0.1,
        "scope": scope,
        "backend": backend,
    }
    if kind == "adagrad":
        optimizer: Any = MAdagradNorm(groups, 0.1, beta1=0.8, **common)
        keep, admit = 1.0, 0.4
    else:
        optimizer = AdamNorm(groups, 0.1, betas=(0.8, 0.9), **common)
        keep, admit = 0.9, 0.4 * (1 - 0.9)
    units = {"global": [[0, 1, 2]], "group": [[0, 1], [2]], "tensor": [[0], [1], [2]]}[scope]
    squares = [0.49 for _ in units]
    momentum = [torch.zeros_like(q) for q in plain]
    for row in record_grads(params, 5):
        advance(optimizer, params, [row])
        g = clipped(row, units, 1.0)
        momentum = [0.8 * m + (1 - 0.8) * x for m, x in zip(momentum, g, strict=True)]
        for u, unit in enumerate(units):
            before = squares[u]
            squares[u] = keep * before + admit * sum(float(g[i].square().sum()) for i in unit)
            b = math.sqrt(before if delayed else squares[u])
            for i in unit:
                plain[i] -= 0.1 * 0.1 * plain[i] + 0.1 / b * momentum[i]
                state = optimizer.state[params[i]]
                assert float(state["norm_sq"]) == pytest.approx(squares[u], rel=1e-12)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-13)


@every_backend
@pytest.mark.parametrize("delayed", [False, True])
def test_coordinate_wise_formula(delayed: bool, backend: str) -> None:
    (p,) = make_params([(40,)], F64)
    plain = p.detach().clone()
    optimizer = AdamNorm(
        [p], 0.1, b_init=0.3, betas=(0.8, 0.9), delayed=delayed, coordinate_wise=True,
        eps=1e-3, backend=backend,
    )  # fmt: skip
    v, m = torch.full_like(plain, 0.3**2), torch.zeros_like(plain)
    for row in record_grads([p], 4):
        advance(optimizer, [p], [row])
        before = v
        v, m = 0.9 * v + (1 - 0.9) * row[0] ** 2, 0.8 * m + (1 - 0.8) * row[0]
        plain -= 0.1 * m / ((before if delayed else v).sqrt() + 1e-3)
    torch.testing.assert_close(p.detach(), plain, rtol=1e-12, atol=1e-13)


@every_backend
def test_reweight_is_a_change_of_parameters(backend: str) -> None:
    one, other = make_params([(50,), (7,)], F64), make_params([(50,), (7,)], F64)
    rows = record_grads(one, 6)
    eta = 0.09
    advance(
        ClipRAdaGradD(one, 0.2, b_init=0.6, max_norm=1.0, reweight=eta, backend=backend), one, rows
    )
    root = math.sqrt(eta)
    advance(
        ClipRAdaGradD(other, 0.2 / root, b_init=0.6 / root, max_norm=1.0, backend=backend),
        other,
        rows,
    )
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@every_backend
@pytest.mark.parametrize("make", [ClipRAdaGradD, AdamDNorm])
def test_a_delayed_step_does_not_see_its_own_gradient(make: Any, backend: str) -> None:
    """An outlier makes a first step of lr * max_norm / b_init: b has not grown yet."""
    (p,) = make_params([(64,)], F64)
    start = p.detach().clone()
    kwargs = {"betas": (0.0, 0.9)} if make is AdamDNorm else {}
    optimizer = make([p], 0.1, b_init=0.5, max_norm=2.0, backend=backend, **kwargs)
    p.grad = 1e6 * torch.ones_like(p)
    optimizer.step()
    assert float((p.detach() - start).norm()) == pytest.approx(0.1 * 2.0 / 0.5, rel=1e-12)


@every_backend
def test_a_parameter_without_a_gradient_keeps_up(backend: str) -> None:
    """All members of a scope unit hold one number, whoever had a gradient."""
    params = make_params([(30,), (5,)], F64)
    optimizer = AdagradNorm(params, 0.1, b_init=0.5, backend=backend)
    rows = record_grads(params, 4)
    total = 0.25
    for row, present in zip(
        rows, [(True, False), (True, True), (False, True), (True, True)], strict=True
    ):
        given = [g if there else None for g, there in zip(row, present, strict=True)]
        set_grads(params, given)
        optimizer.step()
        total += sum(float(g.square().sum()) for g in given if g is not None)
        for p in params:
            if p in optimizer.state:
                number = float(optimizer.state[p]["norm_sq"])
                assert number == pytest.approx(total, rel=1e-12)
    assert len(optimizer.state) == 2


@every_backend
def test_a_unit_without_gradients_stays(backend: str) -> None:
    params = make_params([(30,), (5,)], F64)
    optimizer = AdagradNorm(params, 0.1, b_init=0.5, scope="tensor", backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    held = float(optimizer.state[params[1]]["norm_sq"])
    set_grads(params, [rows[1][0], None])
    optimizer.step()
    assert float(optimizer.state[params[1]]["norm_sq"]) == held


@every_backend
def test_groups_that_divide_by_coordinates_add_nothing_to_the_norm(backend: str) -> None:
    params = make_params([(30,), (5,)], F64)
    groups: list[dict[str, Any]] = [
        {"params": params[:1]},
        {"params": params[1:], "coordinate_wise": True},
    ]
    optimizer = AdagradNorm(groups, 0.1, b_init=0.5, backend=backend)
    (row,) = record_grads(params, 1)
    advance(optimizer, params, [row])
    number = float(optimizer.state[params[0]]["norm_sq"])
    assert number == pytest.approx(0.25 + float(row[0].square().sum()), rel=1e-12)
    assert "norm_sq" not in optimizer.state[params[1]]


@every_backend
def test_a_skipped_step_leaves_the_number(backend: str) -> None:
    params = make_params([(30,), (5,)])
    optimizer = AdamNorm(params, 0.1, b_init=0.5, nonfinite="skip", backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    held = float(optimizer.state[params[0]]["norm_sq"])
    rows[1][0][3] = math.nan
    advance(optimizer, params, rows[1:])
    assert optimizer.skipped_steps() == 1
    assert float(optimizer.state[params[0]]["norm_sq"]) == held


@every_backend
def test_a_replaced_number_is_noticed(backend: str) -> None:
    """Plans hold addresses: the number of a parameter without a gradient is written as well."""
    params = make_params([(30,), (5,)])
    optimizer = AdagradNorm(params, 0.1, b_init=0.5, backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    old = optimizer.state[params[1]]["norm_sq"]
    held = float(old)
    optimizer.state[params[1]]["norm_sq"] = new = old.clone()
    set_grads(params, [rows[1][0], None])
    optimizer.step()
    assert float(old) == held
    assert float(new) == float(optimizer.state[params[0]]["norm_sq"]) > held


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: AdagradNorm(p, b_init=0.0), ValueError, "b_init must be greater than 0"),
        (lambda p: AdagradNorm(p, b_init=1e200), ValueError, "b_init must be from 1e-150"),
        (lambda p: AdagradNorm(p), TypeError, "b_init"),
        (lambda p: AdagradNorm(p, b_init=1, reweight=0), ValueError, "reweight must be greater"),
        (lambda p: AdagradNorm(p, b_init=1, delayed=1), TypeError, "delayed must be True"),
        (
            lambda p: AdagradNorm(p, b_init=1, clip="value", max_norm=1.0),
            ValueError,
            "coordinate_wise=True only",
        ),
        (lambda p: MAdagradNorm(p, b_init=1, beta1=1.0), ValueError, r"beta1 must be in \[0, 1\)"),
        (lambda p: AdamNorm(p, b_init=1, betas=(0.9, 1.0)), ValueError, "must be less than 1"),
        (lambda p: AdamNorm(p, b_init=1, betas=0.9), ValueError, "betas must be two numbers"),
        (lambda p: ClipRAdaGradD(p, b_init=1, max_norm=None), TypeError, "max_norm must be"),
    ],
)
def test_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(make_params([(3,)]))


@every_backend
def test_a_number_of_the_wrong_kind_is_refused(backend: str) -> None:
    params = make_params([(30,)])
    optimizer = AdagradNorm(params, 0.1, b_init=0.5, backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    saved = optimizer.state_dict()
    saved["state"][0]["norm_sq"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'norm_sq'.*is not one number"):
        optimizer.load_state_dict(saved)
    before = params[0].detach().clone()
    optimizer.state[params[0]]["norm_sq"] = torch.zeros((), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'norm_sq'.*is not a float64 tensor"):
        advance(optimizer, params, rows[1:])
    assert torch.equal(params[0], before)
