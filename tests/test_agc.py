"""Adaptive gradient clipping: rows of parameters and gradients, wherever they lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from battery import advance, assert_same_bits, every_backend, make_params, record_grads, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import _cpu

# Rows of one element and of many chunks; many rows in a chunk, and rows that end beside one.
SHAPES = [(), (1,), (33,), (70_001,), (7, 5), (5000, 3), (40_000, 1), (3, 40_001), (2, 32_768)]
SHAPES += [(1, 70_000), (16, 8, 3, 3), (2, 3, 4, 5), (0, 4), (4, 0)]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), _cpu.isa()
    yield
    torch.set_num_threads(threads)
    _cpu.set_isa(isa)


def expected(p: Tensor, g: Tensor, factor: float = 0.01, eps: float = 1e-3) -> Tensor:
    """The formula in float64."""
    wide = torch.complex128 if p.is_complex() else torch.float64

    def norm(x: Tensor) -> Tensor:
        square = x.detach().to(wide).abs().square()
        rows = square.reshape(x.shape[0], -1).sum(1) if x.dim() >= 2 and x.numel() else square.sum()
        return rows.sqrt().reshape(rows.shape + (1,) * (x.dim() - rows.dim()))

    coef = factor * norm(p).clamp(min=eps) / norm(g)
    return g.detach().to(wide) * torch.where(norm(g) == 0, 1.0, coef.clamp(max=1.0))


def uneven(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients of which some rows are clipped and some are not."""
    g = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    if g.dim() >= 2:
        g *= torch.logspace(-4, 0, g.shape[0]).view(-1, *[1] * (g.dim() - 1))
    return g.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_backend
def test_step_against_the_formula(shape: tuple[int, ...], backend: Any) -> None:
    p = Parameter(torch.randn(shape))
    if p.dim() >= 2 and p.shape[0] > 2:
        p.data[1] = 0  # below eps
    optimizer = pysmooth.ClipSGD([p], 1.0, clip="agc", agc_factor=0.02, backend=backend)
    for _ in range(2):
        p.grad = uneven(shape)
        if p.dim() >= 2 and p.shape[0] > 2:
            p.grad[2] = 0
        want = p.detach().double() - expected(p, p.grad, factor=0.02)
        optimizer.step()
        torch.testing.assert_close(p.detach(), want.float(), rtol=3e-7, atol=1e-7)


def lie(x: Tensor, order: list[int], gap: int) -> Tensor:
    """The same values, with the dimensions in another order in memory, `gap` elements apart."""
    wide = torch.full((*(x.shape[d] for d in order), gap), 55.0, dtype=x.dtype)
    view: Tensor = wide[..., 0].permute([order.index(d) for d in range(x.dim())])
    return view.copy_(x)


@every_backend
@given(data=st.data())
def test_any_layout(data: st.DataObject, backend: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    dtype = data.draw(st.sampled_from(dtypes))
    orders = st.permutations(range(len(shape)))
    p0 = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    g = uneven(shape, dtype)
    p = Parameter(lie(p0, data.draw(orders), data.draw(st.integers(1, 2))))
    p.grad = lie(g, data.draw(orders), data.draw(st.integers(1, 3)))
    want = expected(p0, g, factor=0.1)
    optimizer = pysmooth.ClipSGD(
        [p], 1.0, momentum=0.5, clip="agc", agc_factor=0.1, backend=backend
    )
    optimizer.step()
    if p.numel() == 0:
        return
    m = optimizer.state[p]["momentum_buffer"]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(m.to(want.dtype), want, rtol=tolerance, atol=tolerance)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(p.detach().to(want.dtype), p0 - want, rtol=eps, atol=eps)


@given(data=st.data())
def test_function_in_any_layout(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
    dtype = data.draw(st.sampled_from(dtypes))
    orders = st.permutations(range(len(shape)))
    p0 = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    p = Parameter(lie(p0, data.draw(orders), data.draw(st.integers(1, 2))))
    p.grad = lie(uneven(shape, dtype), data.draw(orders), data.draw(st.integers(1, 3)))
    want, version = expected(p, p.grad), p.grad._version
    pysmooth.agc_([Parameter(torch.ones(3)), p])
    eps = max(torch.finfo(dtype).eps, 1e-6) if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(p.grad.to(want.dtype), want, rtol=eps, atol=1e-30)
    assert p.grad._version >= version
    assert same_bits(p.detach(), p0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits_for_any_threads_and_instruction_set(dtype: torch.dtype) -> None:
    shapes = [(300, 401), (7,), (), (3, 40_001), (70_001,), (9, 5, 3, 3), (40_000, 1)]

    def run() -> list[Tensor]:
        params = make_params(shapes, dtype)
        params[0] = Parameter(params[0].detach().t().contiguous().t())  # rows lie across
        optimizer = pysmooth.AdamW(params, 0.01, clip="agc", backend="cpu")
        advance(optimizer, params, record_grads(params, 3))
        functional = [Parameter(p.detach().clone()) for p in params]
        for p, g in zip(functional, record_grads(params, 1)[0], strict=True):
            p.grad = g.to(dtype)
        pysmooth.agc_(functional)
        norm, coef = optimizer.last_norm(), optimizer.last_clip_coef()
        assert norm is not None
        assert coef is not None
        return [*params, *(p.grad for p in functional if p.grad is not None), norm, coef]

    torch.set_num_threads(1)
    first = run()
    for threads, isa in itertools.product((1, 2, 3, 5), _cpu.isa_levels()):
        torch.set_num_threads(threads)
        _cpu.set_isa(isa)
        assert_same_bits(first, run())


def test_function_and_step_give_the_same_bits() -> None:
    a, b = make_params(), make_params()
    inside = pysmooth.ClipSGD(a, 0.1, momentum=0.9, clip="agc", backend="cpu")
    outside = pysmooth.ClipSGD(b, 0.1, momentum=0.9, backend="cpu")
    for row in record_grads(a, 4):
        for p, q, g in zip(a, b, row, strict=True):
            p.grad, q.grad = g.float(), g.float()
        inside.step()
        pysmooth.agc_(b)
        outside.step()
    assert_same_bits(a, b)


MAKES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": lambda p, **kw: pysmooth.Adagrad(p, 0.1, **kw),
    "adam": lambda p, **kw: pysmooth.Adam(p, 0.01, **kw),
    "scaled sign": lambda p, **kw: pysmooth.SignSGD(p, 0.1, scaled=True, **kw),
    "lion": lambda p, **kw: pysmooth.Lion(p, 0.01, **kw),
    "normalized": lambda p, **kw: pysmooth.NormalizedSGD(p, 0.1, **kw),
    "norm": lambda p, **kw: pysmooth.AdagradNorm(p, 0.1, b_init=0.5, **kw),
    "low": lambda p, **kw: pysmooth.Adam(p, 0.01, state_dtype=torch.bfloat16, **kw),
}


@every_backend
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_every_rule_sees_the_clipped_gradient(
    make: Callable[..., torch.optim.Optimizer], backend: str
) -> None:
    """A step with the clip is a step without on gradients clipped by hand."""
    a, b = make_params(), make_params()
    with_clip, without = make(a, clip="agc", backend=backend), make(b, clip="none", backend=backend)
    for row in record_grads(a, 3):
        for p, q, g in zip(a, b, row, strict=True):
            p.grad, q.grad = g.float(), expected(q, g).float()
        with_clip.step()
        without.step()
    for p, q in zip(a, b, strict=True):
        # A sign, or the rounding of a state, may fall on the other side.
        close = torch.isclose(p.detach(), q.detach(), rtol=1e-5, atol=1e-5)
        assert close.float().mean() > 0.99 or p.numel() == 0


@every_backend
def test_what_can_be_read_after_a_step(backend: Any) -> None:
    p, q, idle = Parameter(torch.ones(2, 4)), Parameter(torch.ones(4)), Parameter(torch.ones(2))
    optimizer = pysmooth.ClipSGD([p, q, idle], 0.1, clip="agc", backend=backend)
    p.grad = torch.tensor([[1.0] * 4, [1e-4] * 4])
    q.grad = torch.full((4,), 1e-3)
    optimizer.step()
    norm, coef = optimizer.last_norm(), optimizer.last_clip_coef()
    assert norm is not None
    assert coef is not None
    assert float(norm) == pytest.approx(math.sqrt(4 + 4e-8 + 4e-6))
    # The smallest of the tensor's rows.
    torch.testing.assert_close(coef, torch.tensor([0.01, 1.0, 1.0]))


@every_backend
@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_norm_type_is_of_the_norm_that_is_read(backend: Any, norm_type: float) -> None:
    a, b = make_params(), make_params()
    usual = pysmooth.ClipSGD(a, 0.1, clip="agc", backend=backend)
    other = pysmooth.ClipSGD(b, 0.1, clip="agc", norm_type=norm_type, backend=backend)
    rows = record_grads(a, 1)
    advance(usual, a, rows)
    advance(other, b, rows)
    assert_same_bits(a, b)
    norm = other.last_norm()
    assert norm is not None
    want = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in rows[0]]), norm_type)
    assert float(norm) == pytest.approx(float(want), rel=1e-5)


@every_backend
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_row_that_is_not_finite(backend: Any, value: float) -> None:
    p = Parameter(torch.ones(3, 4))
    grad = torch.ones(3, 4)
    grad[1, 2] = value
    for policy in ("skip", "raise"):
        optimizer = pysmooth.ClipSGD([p], 0.1, clip="agc", nonfinite=policy, backend=backend)  # type: ignore[arg-type]
        p.grad = grad.clone()
        if policy == "raise":
            with pytest.raises(pysmooth.NonFiniteGradientError):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps() == 1
        assert torch.equal(p, torch.ones(3, 4))
    pysmooth.ClipSGD([p], 0.1, clip="agc", backend=backend).step()  # propagates
    assert not p[1, 2].isfinite()
    assert p[[0, 2]].isfinite().all()
    assert (p[[0, 2]] < 1).all()


@every_backend
def test_scaled_gradients(backend: Any) -> None:
    a, b = make_params(), make_params()
    for row in record_grads(a, 3):
        for p, q, g in zip(a, b, row, strict=True):
            p.grad, q.grad = 1024 * g.float(), g.float()
        for params, scale in ((a, torch.tensor(1024.0)), (b, None)):
            optimizer = pysmooth.ClipSGD(params, 0.1, clip="agc", backend=backend)
            optimizer.grad_scale = scale  # type: ignore[attr-defined]  # as GradScaler does
            optimizer.step()
    assert_same_bits(a, b)


@every_backend
def test_groups_may_differ_and_change(backend: Any) -> None:
    """One group by rows, one by its norm; then the other way round."""
    params, by_hand = make_params([(5, 3), (4, 6)]), make_params([(5, 3), (4, 6)])
    groups = [
        {"params": params[:1], "clip": "agc"},
        {"params": params[1:], "clip": "hard", "max_norm": 0.5},
    ]
    optimizer = pysmooth.ClipSGD(groups, 0.1, scope="group", clip_eps=0.0, backend=backend)
    for i, row in enumerate(record_grads(params, 2)):
        if i == 1:
            optimizer.param_groups[0].update(clip="hard", max_norm=0.5)
            optimizer.param_groups[1].update(clip="agc", max_norm=None)
        for j, (p, q, g) in enumerate(zip(params, by_hand, row, strict=True)):
            p.grad = g.float()
            hard = g * min(1.0, 0.5 / float(g.norm()))
            q.data = (q.double() - 0.1 * (expected(q, g) if i == j else hard)).float().data
        optimizer.step()
        for p, q in zip(params, by_hand, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"agc_factor": 0.0}, "agc_factor must be greater than 0"),
        ({"agc_factor": math.nan}, "agc_factor"),
        ({"agc_eps": -1.0}, "agc_eps must be at least 0"),
        ({"max_norm": 1.0}, "max_norm must be None for clip='agc', which takes agc_factor"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pysmooth.ClipSGD([Parameter(torch.ones(3))], 0.1, clip="agc", **kwargs)


@pytest.mark.parametrize(("factor", "eps"), [(0.0, 1e-3), (-1.0, 1e-3), (0.1, math.nan)])
def test_bad_arguments_of_the_function(factor: float, eps: float) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="must be"):
        pysmooth.agc_([p], factor, eps)
    assert torch.equal(p.grad, torch.ones(3))


@pytest.mark.parametrize("native", [True, False])
def test_gradients_that_cannot_be_scaled(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("pysmooth._agc.available_backends", lambda: ("eager",))
    good, p = Parameter(torch.ones(2, 3)), Parameter(torch.ones(2, 3))
    good.grad = torch.ones(2, 3)
    for grad, message in [
        (torch.ones(1, 3).expand(2, 3), "gradient 1 overlaps itself"),
        (good.grad.view(2, 3), "gradients 0 and 1 share memory"),
    ]:
        p.grad = grad
        with pytest.raises(ValueError, match=message):
            pysmooth.agc_([good, p])
        assert torch.equal(good.grad, torch.ones(2, 3))
    p.grad = None
    p.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises((ValueError, TypeError), match="sparse"):
        pysmooth.agc_([good, p])


def test_function_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    params, twins = make_params(), make_params()
    for p, q, g in zip(params, twins, record_grads(params, 1)[0], strict=True):
        p.grad, q.grad = g.float(), g.float()
    pysmooth.agc_(params)
    monkeypatch.setattr("pysmooth._agc.available_backends", lambda: ("eager",))
    pysmooth.agc_(iter(twins))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
