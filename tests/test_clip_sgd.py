"""ClipSGD against the formulas of its documentation, written out in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    every_backend,
    make_params,
    max_ulp,
    record_grads,
    same_bits,
    set_grads,
)
from torch import Tensor

from pysmooth import ClipSGD

INF = float("inf")
SHAPES = ((7, 5), (), (33,), (0, 4), (5003,), (2, 3))
GROUPS = ((0, 1, 2), (3, 4, 5))  # two groups of these parameters
NOT_EMPTY = [i for i, shape in enumerate(SHAPES) if 0 not in shape]
CLOSE = {"rtol": 4e-7, "atol": 0.0}  # a norm's square root, sum and division, in float32
# One step's error, in units of max(|p|, |update|): the new value may be a binade larger, and the
# update is a product of three rounded factors.
STEP_ULP = 4


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": [params[i] for i in g]} for g in GROUPS]


def norm_of(grads: list[Tensor], order: float = 2.0) -> float:
    """The norm of all gradients together, as one vector of float64 numbers."""
    flat = torch.cat([g.double().reshape(-1) for g in grads])
    if flat.numel() == 0:
        return 0.0
    if order == INF:
        return float(flat.abs().max())
    return float((flat.abs() ** order).sum() ** (1.0 / order))


def units(scope: str) -> list[list[int]]:
    """Which parameters share a norm."""
    everything = list(range(len(SHAPES)))
    return {
        "global": [everything],
        "group": [list(g) for g in GROUPS],
        "tensor": [[i] for i in everything],
    }[scope]


def coefficient(clip: str, norm: float, max_norm: float, eps: float = 1e-6) -> float:
    if clip == "hard":
        return min(1.0, max_norm / (norm + eps))
    if clip == "smooth":
        return 1.0 / (1.0 + norm / max_norm)
    if clip == "normalize":
        return 0.0 if norm == 0.0 else max_norm / (norm + eps)
    return 1.0


def expected_coefs(clip: str, scope: str, grads: list[Tensor], max_norm: float, **kw: Any) -> Any:
    """Norm per unit and coefficient per parameter."""
    order = kw.pop("order", 2.0)
    norms = [norm_of([grads[i] for i in unit], order) for unit in units(scope)]
    coefs = [1.0] * len(grads)
    for unit, norm in zip(units(scope), norms, strict=True):
        for i in unit:
            coefs[i] = coefficient(clip, norm, max_norm, **kw)
    return norms, coefs


def one_step(
    backend: str, grads: list[Tensor], **kwargs: Any
) -> tuple[list[Tensor], list[Tensor], ClipSGD]:
    """Parameters before, in float64, and after one step."""
    params = make_params(SHAPES)
    start = [p.detach().double() for p in params]
    optimizer = ClipSGD(groups_of(params), backend=backend, **kwargs)
    advance(optimizer, params, [grads])
    return start, params, optimizer


def assert_close(params: list[Tensor], want: list[Tensor], start: list[Tensor], ulp: float) -> None:
    for p, w, s in zip(params, want, start, strict=True):
        assert max_ulp(p, w, torch.maximum(s.abs(), (w - s).abs())) <= ulp


# ---- the clip -----------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("clip", ["hard", "smooth", "normalize", "none"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_norm_clips(clip: str, scope: str, size: float, backend: str) -> None:
    params = make_params(SHAPES)
    grads = [size * g for g in record_grads(params, 3)[2]]
    grads = [g.float().double() for g in grads]
    max_norm, lr = 2.5, 0.3
    start, params, optimizer = one_step(
        backend, grads, lr=lr, max_norm=max_norm, clip=clip, scope=scope
    )
    norms, coefs = expected_coefs(clip, scope, grads, max_norm)
    want = [s - lr * c * g for s, c, g in zip(start, coefs, grads, strict=True)]
    assert_close(params, want, start, ulp=STEP_ULP)
    if clip == "none":
        assert optimizer.last_norm() is None
        assert optimizer.last_clip_coef() is None
        return
    got = optimizer.last_norm()
    assert got.shape == {"global": (), "group": (2,), "tensor": (len(SHAPES),)}[scope]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double().reshape(-1), torch.tensor(norms).double(), **CLOSE)
    coef = optimizer.last_clip_coef()
    assert coef.dtype == torch.float32
    assert coef.shape == (len(SHAPES),)
    torch.testing.assert_close(
        coef[NOT_EMPTY].double(), torch.tensor(coefs).double()[NOT_EMPTY], **CLOSE
    )


@every_backend
def test_value_clamps_each_coordinate(backend: str) -> None:
    params = make_params(SHAPES)
    grads = record_grads(params, 3)[2]
    start, params, optimizer = one_step(backend, grads, lr=0.3, max_norm=0.5, clip="value")
    want = [s - 0.3 * g.clamp(-0.5, 0.5) for s, g in zip(start, grads, strict=True)]
    assert any((g.abs() > 0.5).any() for g in grads)
    assert_close(params, want, start, ulp=STEP_ULP)
    assert optimizer.last_norm() is None
    assert optimizer.last_clip_coef() is None


@every_backend
@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, INF])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_norm_type(order: float, scope: str, backend: str) -> None:
    grads = record_grads(make_params(SHAPES), 3)[2]
    start, params, optimizer = one_step(
        backend, grads, lr=0.3, max_norm=0.7, scope=scope, norm_type=order
    )
    norms, coefs = expected_coefs("hard", scope, grads, 0.7, order=order)
    loose = {"rtol": 4e-6, "atol": 0.0}
    torch.testing.assert_close(
        optimizer.last_norm().double().reshape(-1), torch.tensor(norms).double(), **loose
    )
    want = [s - 0.3 * c * g for s, c, g in zip(start, coefs, grads, strict=True)]
    assert_close(params, want, start, ulp=16)


@every_backend
@pytest.mark.parametrize("clip", ["hard", "smooth", "normalize"])
def test_clip_eps_zero_is_exact(clip: str, backend: str) -> None:
    """Norm 5, threshold 2: with the default of 1e-6 the coefficient would be seen to differ."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = ClipSGD([p], lr=1.0, max_norm=2.5, clip=clip, clip_eps=0.0, backend=backend)
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    want = {"hard": [-1.5, -2.0], "normalize": [-1.5, -2.0], "smooth": [-1.0, -4.0 / 3.0]}[clip]
    torch.testing.assert_close(p.detach(), torch.tensor(want), rtol=1.2e-7, atol=0)
    assert float(optimizer.last_norm()) == 5.0


@every_backend
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("clip", ["hard", "smooth", "normalize"])
def test_zero_gradient_moves_nothing(clip: str, eps: float, backend: str) -> None:
    (p,) = make_params([(5,)])
    start = p.detach().clone()
    optimizer = ClipSGD([p], lr=1.0, max_norm=2.0, clip=clip, clip_eps=eps, backend=backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same_bits(p, start)
    want = {"hard": 1.0, "smooth": 1.0, "normalize": 0.0}[clip]
    assert optimizer.last_clip_coef().tolist() == [want]
    assert float(optimizer.last_norm()) == 0.0


@every_backend
def test_normalize_without_threshold_is_a_unit_step(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = ClipSGD([p], lr=0.5, clip="normalize", clip_eps=0.0, backend=backend)
    p.grad = torch.tensor([30.0, -40.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.3, 0.4]), rtol=2e-7, atol=0)


@every_backend
@pytest.mark.parametrize("clip", ["hard", "smooth"])
def test_infinite_threshold_takes_the_norm_and_clips_nothing(clip: str, backend: str) -> None:
    grads = record_grads(make_params(SHAPES), 3)[2]
    _, free, unclipped = one_step(backend, grads, lr=0.3)
    _, params, optimizer = one_step(backend, grads, lr=0.3, max_norm=INF, clip=clip)
    assert_same_bits(params, free)
    assert unclipped.last_norm() is None
    torch.testing.assert_close(float(optimizer.last_norm()), norm_of(grads), rtol=4e-7, atol=0)
    assert optimizer.last_clip_coef().tolist() == [1.0] * len(SHAPES)


@every_backend
def test_each_group_has_its_own_threshold_for_one_norm(backend: str) -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [
        {"params": [a], "max_norm": 2.5},
        {"params": [b], "clip": "none"},
        {"params": [c], "clip": "smooth", "max_norm": 5.0},
    ]
    optimizer = ClipSGD(groups, lr=1.0, clip_eps=0.0, backend=backend)
    for p, g in ((a, 3.0), (b, 4.0), (c, 12.0)):
        p.grad = torch.tensor([g])
    optimizer.step()
    assert float(optimizer.last_norm()) == 13.0
    got = torch.cat([p.detach() for p in (a, b, c)])
    want = torch.tensor([-3 * 2.5 / 13, -4.0, -12 / (1 + 13 / 5)])
    torch.testing.assert_close(got, want, rtol=2e-7, atol=0)
    torch.testing.assert_close(
        optimizer.last_clip_coef(), torch.tensor([2.5 / 13, 1.0, 5 / 18]), rtol=2e-7, atol=0
    )


@every_backend
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_parameters_without_gradient_count_as_zero_in_norms(scope: str, backend: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = ClipSGD(groups, lr=1.0, max_norm=100.0, scope=scope, backend=backend)
    params[1].grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    want = {"global": 5.0, "group": [5.0, 0.0], "tensor": [0.0, 5.0, 0.0, 0.0]}[scope]
    assert optimizer.last_norm().tolist() == want


@every_backend
def test_norm_of_the_last_step_only(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = ClipSGD([p], lr=1.0, max_norm=1.0, backend=backend)
    assert optimizer.last_norm() is None
    assert optimizer.last_clip_coef() is None
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    first = optimizer.last_norm()
    p.grad = torch.tensor([6.0, 8.0])
    optimizer.step()
    assert float(first) == 5.0  # a copy, which a later step does not change
    assert float(optimizer.last_norm()) == 10.0
    optimizer.param_groups[0]["max_norm"] = None
    optimizer.step()
    assert optimizer.last_norm() is None


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_is_float32_for_16_bit_gradients(dtype: torch.dtype, backend: str) -> None:
    """300^2 * 4096 overflows float16, and a bfloat16 norm would have 8 bits."""
    p = torch.nn.Parameter(torch.zeros(4096, dtype=dtype))
    optimizer = ClipSGD([p], lr=1.0, max_norm=1.0, clip_eps=0.0, backend=backend)
    p.grad = torch.full_like(p, 300.0)
    optimizer.step()
    assert optimizer.last_norm().dtype == torch.float32
    assert float(optimizer.last_norm()) == 300.0 * 64
    assert p.unique().tolist() == [-1.0 / 64]


@every_backend
def test_norm_is_float64_for_float64_gradients(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ClipSGD([p], lr=1.0, max_norm=1.0, backend=backend)
    p.grad = torch.tensor([1.0, 1e-12], dtype=torch.float64) * 3
    optimizer.step()
    assert optimizer.last_norm().dtype == torch.float64
    assert optimizer.last_clip_coef().dtype == torch.float64
    assert float(optimizer.last_clip_coef()) == pytest.approx(1 / (3 + 1e-6), rel=1e-15)


@every_backend
def test_complex_norm_is_that_of_the_moduli(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = ClipSGD([p], lr=1.0, max_norm=6.5, clip_eps=0.0, backend=backend)
    p.grad = torch.tensor([3 + 4j, 12j])
    optimizer.step()
    assert float(optimizer.last_norm()) == 13.0
    torch.testing.assert_close(p.detach(), torch.tensor([-1.5 - 2j, -6j]), rtol=2e-7, atol=0)


# ---- the update ---------------------------------------------------------------------------------

SGD_CASES = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": w, "maximize": x}
    for m, d, n, w, x in itertools.product(
        (0.0, 0.9), (0.0, 0.4), (False, True), (0.0, 0.1), (False, True)
    )
    if not (n and (m == 0 or d != 0))
]


@every_backend
@pytest.mark.parametrize("no_clip", [{"max_norm": None}, {"max_norm": 0.1, "clip": "none"}])
@pytest.mark.parametrize(
    "case", SGD_CASES, ids=lambda c: "-".join(str(float(v)) for v in c.values())
)
def test_without_clip_it_is_torch_sgd(
    case: dict[str, Any], no_clip: dict[str, Any], backend: str
) -> None:
    """Within two units in the last place of max(|p|, |update|) for each step."""
    params, expected = make_params(SHAPES), make_params(SHAPES)
    optimizer = ClipSGD(params, lr=0.1, backend=backend, **no_clip, **case)
    twin = torch.optim.SGD(expected, lr=0.1, **case)
    sizes = [p.detach().double().abs() for p in expected]
    for steps, row in enumerate(record_grads(params, 10), start=1):
        before = [p.detach().double() for p in expected]
        advance(optimizer, params, [row])
        advance(twin, expected, [row])
        for i, (p, q) in enumerate(zip(params, expected, strict=True)):
            now = q.detach().double()
            sizes[i] = sizes[i].maximum(now.abs()).maximum((now - before[i]).abs())
            assert max_ulp(p, now, sizes[i]) <= 2 * steps
            assert ("momentum_buffer" in optimizer.state[p]) == (case["momentum"] > 0)


@every_backend
def test_bits_of_torch_sgd_where_the_arithmetic_is_exact(backend: str) -> None:
    """Powers of two: no rounding to hide behind."""
    params, expected = ([torch.nn.Parameter(torch.arange(8.0))] for _ in range(2))
    kwargs = {"lr": 0.25, "momentum": 0.5, "dampening": 0.5, "weight_decay": 0.5}
    optimizer = ClipSGD(params, backend=backend, **kwargs)
    twin = torch.optim.SGD(expected, **kwargs)
    rows = [[torch.tensor([1.0, -2, 4, -8, 16, -32, 0, 1])]] * 3
    advance(optimizer, params, rows)
    advance(twin, expected, rows)
    assert_same_bits(params, expected)


@every_backend
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_decoupled_decay(nesterov: bool, maximize: bool, backend: str) -> None:
    """The decay stays out of the momentum, and shrinks for ascent as it does for descent."""
    params = make_params(SHAPES)
    p64 = [p.detach().double() for p in params]
    m64 = [torch.zeros_like(p) for p in p64]
    lr, wd, mu, threshold = 0.1, 0.2, 0.9, 1.5
    optimizer = ClipSGD(
        params,
        lr=lr,
        weight_decay=wd,
        decoupled_weight_decay=True,
        momentum=mu,
        nesterov=nesterov,
        maximize=maximize,
        max_norm=threshold,
        backend=backend,
    )
    rows = record_grads(params, 6)
    for row in rows:
        c = coefficient("hard", norm_of(row), threshold)
        for i, g in enumerate(row):
            clipped = (-c if maximize else c) * g
            m64[i] = mu * m64[i] + clipped
            step = clipped + mu * m64[i] if nesterov else m64[i]
            p64[i] = p64[i] - lr * wd * p64[i] - lr * step
        advance(optimizer, params, [row])
    for p, w in zip(params, p64, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=6 * 2e-7 * 4)


@every_backend
def test_coupled_decay_comes_after_the_clip(backend: str) -> None:
    p = torch.nn.Parameter(torch.tensor([10.0, 0.0]))
    optimizer = ClipSGD(
        [p], lr=1.0, max_norm=2.5, clip_eps=0.0, weight_decay=0.5, momentum=0.9, backend=backend
    )
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert p.tolist() == [10.0 - (1.5 + 5.0), -2.0]
    assert optimizer.state[p]["momentum_buffer"].tolist() == [6.5, 2.0]


@every_backend
def test_momentum_first_step_ignores_dampening(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = ClipSGD([p], lr=1.0, momentum=0.5, dampening=0.75, backend=backend)
    p.grad = torch.ones(1)
    seen = []
    for _ in range(3):
        optimizer.step()
        seen.append(float(optimizer.state[p]["momentum_buffer"]))
    assert seen == [1.0, 0.75, 0.625]
    assert float(p.detach()) == -sum(seen)


@every_backend
def test_momentum_of_bfloat16_parameters_is_float32(backend: str) -> None:
    """A bfloat16 sum of ones stops at 256."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = ClipSGD([p], lr=0.0, momentum=1.0, backend=backend)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert buffer.tolist() == [300.0] * 3


@every_backend
def test_lr_zero_still_feeds_the_momentum(backend: str) -> None:
    (p,) = make_params([(4,)])
    start = p.detach().clone()
    optimizer = ClipSGD([p], lr=0.0, momentum=0.9, weight_decay=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert same_bits(p, start)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 1 + 0.1 * start)


# ---- (L0, L1) steps -----------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize(("l0", "l1"), [(2.0, 0.5), (0.0, 3.0), (4.0, 0.0)])
def test_smoothness_step_size(l0: float, l1: float, scope: str, backend: str) -> None:
    params = make_params(SHAPES)
    start = [p.detach().double() for p in params]
    grads = record_grads(params, 3)[2]
    grads[3] = torch.zeros_like(grads[3])
    optimizer = ClipSGD.from_smoothness(
        groups_of(params), l0, l1, 0.7, scope=scope, backend=backend
    )
    advance(optimizer, params, [grads])
    want = list(start)
    for unit in units(scope):
        norm = norm_of([grads[i] for i in unit])
        for i in unit:
            curvature = l0 + l1 * norm
            want[i] = start[i] - (0.7 / curvature if curvature else 0.0) * grads[i]
    assert_close(params, want, start, ulp=STEP_ULP)


@every_backend
def test_smoothness_is_smooth_clipping(backend: str) -> None:
    l0, l1, eta = 4.0, 0.5, 2.0
    params, expected = make_params(SHAPES), make_params(SHAPES)
    rows = record_grads(params, 5)
    optimizer = ClipSGD.from_smoothness(params, l0, l1, eta, backend=backend)
    advance(optimizer, params, rows)
    twin = ClipSGD(expected, lr=eta / l0, max_norm=l0 / l1, clip="smooth", backend=backend)
    advance(twin, expected, rows)
    for p, q in zip(params, expected, strict=True):
        assert max_ulp(p, q.detach().double(), q.detach().double().abs() + 1) <= len(rows)
    ratio = optimizer.last_clip_coef() / twin.last_clip_coef()  # 1 / (L0 + L1 n) = smooth / L0
    ratio = ratio[NOT_EMPTY]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / l0), rtol=4e-7, atol=0)


@every_backend
def test_smoothness_at_a_stationary_point(backend: str) -> None:
    """With L0 = 0 the step size has no value where the gradient is 0: nothing moves."""
    (p,) = make_params([(3,)])
    start = p.detach().clone()
    optimizer = ClipSGD.from_smoothness([p], 0.0, 1.0, backend=backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same_bits(p, start)
    assert optimizer.last_clip_coef().tolist() == [0.0]


@every_backend
def test_smoothness_takes_the_other_arguments_and_late_groups(backend: str) -> None:
    first, late = make_params([(3,), (2,)])
    optimizer = ClipSGD.from_smoothness(
        [first], 1.0, 1.0, 0.5, scope="tensor", momentum=0.9, backend=backend
    )
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    start = [p.detach().double() for p in (first, late)]
    set_grads([first, late], [torch.tensor([0.0, 3.0, 4.0]), torch.tensor([0.6, 0.8])])
    optimizer.step()
    want = [
        start[0] - 0.5 / 6 * torch.tensor([0.0, 3.0, 4.0]).double(),
        start[1] - 0.25 / 2 * torch.tensor([0.6, 0.8]).double(),
    ]
    assert_close([first, late], want, start, ulp=STEP_ULP)
    assert "momentum_buffer" in optimizer.state[first]
    assert math.isclose(float(optimizer.last_norm()[0]), 5.0, rel_tol=1e-6)
