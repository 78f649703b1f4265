"""Norms of the Triton kernels, in Triton's interpreter, and the functions that clip by them."""

from __future__ import annotations

import math

import pytest
import torch
from battery import assert_same_bits, make_params, record_grads, set_grads
from torch.nn import Parameter

import pysmooth
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels.table import CHUNK

from pysmooth.engine import triton_clip

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_against_float64(norm_type: float, dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in record_grads(make_params(dtype=dtype), 1)[0]]
    grads = [g for g in grads if g.numel()]  # torch has no maximum of nothing
    grads.append(torch.randn(3 * CHUNK + 5).to(dtype))
    exact = torch.nn.utils.get_total_norm([g.double() for g in grads], norm_type)
    norm = triton_clip.total_norm(grads, norm_type)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(norm) == pytest.approx(float(exact), rel=1e-12 if norm.itemsize == 8 else 1.5e-7)


@pytest.mark.parametrize("value", [3e38, 1e30, 1e-30, 1e-44, 0.0])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_norms_that_overflow_or_vanish_in_float32(value: float, norm_type: float) -> None:
    x = torch.full((CHUNK + 100,), value)
    exact = float(torch.linalg.vector_norm(x.double(), norm_type))
    norm = float(triton_clip.total_norm([x], norm_type))
    assert norm == float(torch.tensor(exact).float()) or norm == pytest.approx(exact, rel=1e-7)


def test_norms_of_what_is_not_finite() -> None:
    for bad in (math.inf, math.nan):
        for norm_type in (2.0, 1.0, math.inf):
            x = torch.ones(100)
            x[70] = bad
            norm = float(triton_clip.total_norm([torch.ones(20), x], norm_type))
            assert norm == bad or (math.isnan(norm) and math.isnan(bad))


def test_the_order_of_gradients_in_memory_does_not_matter() -> None:
    """The same bits from run to run, wherever things are."""
    x = torch.randn(5 * CHUNK + 3)
    norms = {float(triton_clip.total_norm([x.clone(), x.clone() * 2], 2.0)) for _ in range(4)}
    assert len(norms) == 1


# ---- clipping functions --------------------------------------------------------------------------


@pytest.fixture
def _fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the functions take the Triton backend."""
    monkeypatch.setattr("pysmooth._clip_grad.fastest", lambda _: "triton")
    monkeypatch.setattr("pysmooth._clip_grad.available_backends", lambda: ("triton", "eager"))


@pytest.mark.usefixtures("_fastest")
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0, -math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(norm_type: float, max_norm: float) -> None:
    shapes = [(7, 5), (), (5003,), (3, 2, 3, 3)]
    ours, twins = make_params(shapes), make_params(shapes)
    row = record_grads(ours, 1)[0]
    for kept in (ours, twins):
        set_grads(kept, [None, *row[1:]])
    before = [p.grad.clone() for p in ours[1:] if p.grad is not None]
    norm = pysmooth.clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)  # torch sums in float32
    for p, q in zip(ours[1:], twins[1:], strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    if max_norm > 1e5:
        assert_same_bits([p.grad for p in ours[1:] if p.grad is not None], before)


@pytest.mark.usefixtures("_fastest")
def test_clip_grad_norm_refuses_what_overlaps() -> None:
    p = Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(3).expand(4, 3)
    with pytest.raises(ValueError, match="gradient 0 overlaps itself"):
        pysmooth.clip_grad_norm_([p], 1.0)
    q, shared = Parameter(torch.zeros(3)), torch.ones(5)
    p, q = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    p.grad, q.grad = shared[:3], shared[2:]
    with pytest.raises(ValueError, match="gradients 0 and 1 share memory"):
        pysmooth.clip_grad_norm_([p, q], 1.0)
    assert torch.equal(shared, torch.ones(5))
