"""clip_grad_norm_ and its parts, against torch.nn.utils in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import utils

import pysmooth
from pysmooth.engine import backends

SHAPES = [(300, 41), (7,), (), (0,), (64,), (3, 4, 5)]
ORDERS = [2.0, 1.0, math.inf, -math.inf, 0.5, 3.0, 0.0]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        params.append(p)
    params.append(torch.nn.Parameter(torch.zeros(5, dtype=dtype)))  # without gradient
    return params


def grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def truth(params: list[Tensor], norm_type: float) -> Tensor:
    wide = [g.double() for g in grads(params) if g.numel()]
    return utils.get_total_norm(wide, norm_type)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norm_and_scaled_gradients(norm_type: float, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    expected = truth(params, norm_type)
    before = [g.double().clone() for g in grads(params)]
    max_norm = 0.3 * float(expected)
    norm = pysmooth.clip_grad_norm_(params, max_norm, norm_type)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), expected, rtol=3e-7, atol=0)
    coef = max_norm / (float(expected) + 1e-6)
    eps = torch.finfo(dtype).eps
    for g, b in zip(grads(params), before, strict=True):
        torch.testing.assert_close(g.double(), b * coef, rtol=max(2 * eps, 1e-6), atol=1e-7)


def test_mixed_dtypes_are_one_vector() -> None:
    params = make_params() + make_params(torch.bfloat16, 1) + make_params(torch.float64, 2)
    norm = pysmooth.clip_grad_norm_(params, 1.0)
    assert norm.dtype == torch.float64
    assert norm > 100
    torch.testing.assert_close(truth(params, 2.0), torch.tensor(1.0).double(), rtol=1e-3, atol=0)


def test_complex_gradients() -> None:
    for norm_type in (2.0, 1.0, math.inf):
        p = torch.nn.Parameter(torch.zeros(9, 5, dtype=torch.complex64))
        p.grad = torch.randn(9, 5, dtype=torch.complex64)
        expected = torch.linalg.vector_norm(p.grad, norm_type)
        before = p.grad.clone()
        norm = pysmooth.clip_grad_norm_([p], 0.5, norm_type)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(p.grad, before * (0.5 / (expected + 1e-6)))


def test_nothing_to_clip_leaves_the_gradients_alone() -> None:
    params = make_params()
    before = [g.clone() for g in grads(params)]
    versions = [g._version for g in grads(params)]
    pysmooth.clip_grad_norm_(params, 1e6)
    assert all(torch.equal(g, b) for g, b in zip(grads(params), before, strict=True))
    assert [g._version for g in grads(params)] == versions


def test_clipping_tells_autograd() -> None:
    params = make_params()
    versions = [g._version for g in grads(params) if g.numel()]
    pysmooth.clip_grad_norm_(params, 1e-3)
    assert all(
        g._version > v
        for g, v in zip([g for g in grads(params) if g.numel()], versions, strict=True)
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nonfinite_norms(bad: float) -> None:
    ours, theirs = make_params(), make_params()
    for params in (ours, theirs):
        assert params[0].grad is not None
        params[0].grad[17, 3] = bad
    before = [g.clone() for g in grads(ours)]
    with pytest.raises(RuntimeError, match="non-finite"):
        pysmooth.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        pysmooth.get_total_norm(grads(ours), error_if_nonfinite=True)
    for g, b in zip(grads(ours), before, strict=True):
        torch.testing.assert_close(g, b, rtol=0, atol=0, equal_nan=True)
    # Without the flag, what torch makes of it.
    a, b = pysmooth.clip_grad_norm_(ours, 1.0), utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(a, b, equal_nan=True)
    for g, h in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(g, h, equal_nan=True)


def test_float16_norm_does_not_overflow() -> None:
    p = torch.nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    p.grad = torch.full((4096,), 30000.0, dtype=torch.float16)
    norm = pysmooth.clip_grad_norm_([p], 64.0)
    assert float(norm) == pytest.approx(30000.0 * 64, rel=1e-6)
    torch.testing.assert_close(p.grad, torch.ones(4096, dtype=torch.float16))


def test_arguments_as_torch_takes_them() -> None:
    p = make_params()[0]
    expected = torch.linalg.vector_norm(p.grad)
    torch.testing.assert_close(pysmooth.clip_grad_norm_(p, math.inf), expected)
    torch.testing.assert_close(pysmooth.clip_grad_norm_((q for q in [p]), 1e9), expected)
    torch.testing.assert_close(pysmooth.get_total_norm(p.grad), expected)
    assert pysmooth.clip_grad_norm_([], 1.0) == 0
    assert pysmooth.clip_grad_norm_([torch.nn.Parameter(torch.zeros(3))], 1.0) == 0
    with pytest.warns(UserWarning, match="empty generator"):
        pysmooth.clip_grad_norm_((q for q in ()), 1.0)
    pysmooth.clip_grad_norm_([p], 0.0)
    assert torch.count_nonzero(p.grad) == 0


def test_clip_grads_with_norm() -> None:
    ours, theirs = make_params(), make_params()
    norm = pysmooth.get_total_norm(grads(ours))
    pysmooth.clip_grads_with_norm_(ours, 1.0, norm)
    utils.clip_grads_with_norm_(theirs, 1.0, norm)
    for g, h in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(g, h)
    pysmooth.clip_grads_with_norm_(ours, 1.0, torch.tensor(math.nan))
    assert grads(ours)[1].isnan().all()


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_bad_max_norm(max_norm: float) -> None:
    params = make_params()
    before = [g.clone() for g in grads(params)]
    with pytest.raises(ValueError, match="max_norm"):
        pysmooth.clip_grad_norm_(params, max_norm)
    with pytest.raises(ValueError, match="max_norm"):
        pysmooth.clip_grads_with_norm_(params, max_norm, torch.tensor(1.0))
    assert all(torch.equal(g, b) for g, b in zip(grads(params), before, strict=True))


def test_sparse_gradients_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 2))
    p.grad = torch.sparse_coo_tensor([[1], [0]], [1.0], (4, 2), check_invariants=True)
    with pytest.raises(ValueError, match=r"gradient 0 has layout torch\.sparse_coo"):
        pysmooth.clip_grad_norm_([p], 1.0)


def test_gradients_that_cannot_be_scaled_in_place() -> None:
    p, q = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(6))
    p.grad = torch.ones(1).expand(6)
    assert float(pysmooth.clip_grad_norm_([p], 1e9)) == pytest.approx(6**0.5)
    with pytest.raises(ValueError, match="gradient 0 overlaps itself"):
        pysmooth.clip_grad_norm_([p], 1.0)
    p.grad = q.grad = torch.ones(6)
    with pytest.raises(ValueError, match="gradients 0 and 1 share memory"):
        pysmooth.clip_grad_norm_([p, q], 1.0)
    assert torch.equal(p.grad, torch.ones(6))


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_load_native", lambda: "no compiler")
    assert backends.available_backends() == ("eager",)
    with pytest.raises(pysmooth.BackendError, match="no compiler"):
        pysmooth.ClipSGD(make_params(), 0.1, backend="cpu")
    optimizer = pysmooth.ClipSGD(make_params(), 0.1)
    assert optimizer.resolved_backend == "eager"
    params = make_params()
    expected = truth(params, 2.0)
    norm = pysmooth.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(float(truth(params, 2.0)), 1.0, rtol=1e-5, atol=0)


def test_meta_tensors_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises(pysmooth.BackendError, match="meta"):
        pysmooth.ClipSGD([p], 0.1, backend="cpu")


@pytest.mark.gpu
def test_cuda_gradients() -> None:
    params = [torch.nn.Parameter(p.detach().cuda()) for p in make_params()]
    for p, q in zip(params, make_params(), strict=True):
        p.grad = None if q.grad is None else q.grad.cuda()
    norm = pysmooth.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm.cpu().double(), truth(make_params(), 2.0), rtol=1e-6, atol=0)
