"""clip_grad_norm_ and get_total_norm on the CUDA backend, emulated: the CPU backend's bits, the
host's calls, and graphs. What users see of them, tests/test_clip_grad.py checks in the same way.
"""

from __future__ import annotations

import math

import pytest
import torch
from battery import CUDA_EMULATED
from simt import emulated
from test_cuda_engine import Capture, NoReads
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import BackendError
from pysmooth.engine import backends, cuda_clip

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not CUDA_EMULATED, reason="PYSMOOTH_EMULATED=1 is not set"),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_clip, "_PLANS", [])
    monkeypatch.setattr(cuda_clip, "_CAPTURED", [])


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.take_cpu_tensors(monkeypatch)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def make_grads(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    sizes = [(1,), (7, 5), (0, 3), (33,), (8195,), (3, 2, 3, 3), (20011,)]
    out = [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in sizes]
    out[1] = out[1].t()  # strided
    out[5] = out[5].contiguous(memory_format=torch.channels_last)
    base = torch.randn(41, generator=gen, dtype=torch.float64).to(dtype)
    return [*out, base[1:], base.clone()[::2]]


# Of complex numbers there is a kernel for the 2-norm only; the others go through torch.
NORMS = [
    (dtype, norm_type)
    for dtype in DTYPES
    for norm_type in (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, -1.0)
    if norm_type == 2.0 or not dtype.is_complex
]


def with_grads(grads: list[Tensor]) -> list[Parameter]:
    params = [Parameter(torch.empty_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize(("dtype", "norm_type"), NORMS, ids=str)
def test_the_cpu_backends_bits(
    dtype: torch.dtype, norm_type: float, error_if_nonfinite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and gradients; of the order 3 and -1 norms to 1e-12: powers add up in lanes."""
    for part in (0.7, 3.0):
        ours, theirs = make_grads(dtype), make_grads(dtype)
        if norm_type in (-math.inf, -1.0):  # empty ones have no smallest element
            ours, theirs = ([g for g in x if g.numel() > 0] for x in (ours, theirs))
        max_norm = part * float(pysmooth.get_total_norm(theirs, norm_type))
        b = pysmooth.clip_grad_norm_(with_grads(theirs), max_norm, norm_type)
        with monkeypatch.context() as patch:
            emulated.take_cpu_tensors(patch)
            held = cuda_clip.total_norm(ours, norm_type)
            args = (with_grads(ours), max_norm, norm_type, error_if_nonfinite)
            a = pysmooth.clip_grad_norm_(*args)
        assert torch.equal(a, held)
        exact = norm_type not in (3.0, -1.0)
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-6, atol=0)
        for x, y in zip(ours, theirs, strict=True):
            if exact:
                assert torch.equal(x, y)
            else:
                torch.testing.assert_close(x, y)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("single", [False, True])
def test_a_call_launches_and_waits_for_nothing(single: bool) -> None:
    """put, reduce, prepare, apply, or all in one; put and reduce for a norm alone.

    Gradients are new each time.
    """
    emulated.module().set_single_launch(single)
    try:
        pysmooth.clip_grad_norm_(with_grads(make_grads()), 1.0)
    finally:
        emulated.module().set_single_launch(None)
    clips = 1 if single else 4
    for seed in range(3):
        params, grads = with_grads(make_grads(seed=seed)), make_grads(seed=seed)
        before = emulated.calls()
        with NoReads():
            a = cuda_clip.clip([p.grad for p in params if p.grad is not None], 1.0, 2.0, False)
        assert emulated.calls() == before._replace(launches=before.launches + clips)
        with NoReads():
            b = cuda_clip.total_norm(grads, 2.0)
        assert emulated.calls() == before._replace(launches=before.launches + clips + 2)
        assert torch.equal(a, b)


@pytest.mark.usefixtures("on_cuda")
def test_plans_are_kept_by_form_and_order() -> None:
    def uploads(grads: list[Tensor], norm_type: float = 2.0) -> int:
        before = emulated.calls().uploads
        pysmooth.clip_grad_norm_(with_grads(grads), 1.0, norm_type)
        return emulated.calls().uploads - before

    assert [uploads(make_grads()) for _ in range(2)] == [1, 0]
    assert [uploads(make_grads(), 1.0), uploads(make_grads())] == [1, 0]
    assert [uploads(make_grads()[:3]), uploads(make_grads())] == [1, 0]
    assert [uploads(make_grads(torch.bfloat16)), uploads(make_grads())] == [1, 0]
    other = make_grads()
    other[1] = other[1].contiguous()
    assert uploads(other) == 1
    for size in range(20, 40):
        assert uploads([torch.ones(size)]) == 1
    assert len(cuda_clip._PLANS) == cuda_clip._MOST
    assert uploads(make_grads()) == 1


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("error_if_nonfinite", [False, True])
def test_a_norm_that_float32_cannot_hold(error_if_nonfinite: bool) -> None:
    """The error goes by the norm that is returned, though every gradient is finite."""
    grads = [torch.full((9,), 3e38), torch.ones(3)]
    params = with_grads([g.clone() for g in grads])
    if error_if_nonfinite:
        with pytest.raises(RuntimeError, match="non-finite"):
            pysmooth.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        assert all(p.grad._version == 0 for p in params)  # type: ignore[union-attr]
    else:
        assert pysmooth.clip_grad_norm_(params, 1.0).isinf()
        torch.testing.assert_close(params[0].grad, torch.full((9,), 1 / 3))


@pytest.mark.usefixtures("on_cuda")
def test_what_the_kernels_do_not_take_goes_through_torch() -> None:
    before = emulated.calls()
    mixed = [torch.ones(3), torch.full((4,), 2).to(torch.float8_e4m3fn)]
    assert float(pysmooth.get_total_norm(mixed)) == pytest.approx(19**0.5)
    assert emulated.calls() == before
    with pytest.raises(ValueError, match="gradient 1 has layout"):
        pysmooth.get_total_norm([torch.ones(2), torch.ones(2).to_sparse()])


def test_replays_and_other_calls_do_not_disturb_each_other(on_cuda: None) -> None:
    static, max_norm = make_grads(), 1.0
    params = with_grads(static)
    pysmooth.clip_grad_norm_(params, max_norm)
    graph = Capture()
    with graph:
        norm = pysmooth.clip_grad_norm_(params, max_norm)
    assert len(cuda_clip._CAPTURED) == 1
    for seed in range(1, 4):
        for held, value in zip(static, make_grads(seed=seed), strict=True):
            held.copy_(value)
        graph.replay()
        twins = with_grads(make_grads(seed=seed))
        pysmooth.clip_grad_norm_(twins, max_norm)
        pysmooth.clip_grad_norm_(with_grads(make_grads(seed=seed + 9)), 5.0)
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert norm.shape == ()


def test_a_capture_needs_a_call_before_it(on_cuda: None) -> None:
    params = with_grads(make_grads())
    with Capture(), pytest.raises(BackendError, match="run the same step once before"):
        pysmooth.clip_grad_norm_(params, 1.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, make_grads(), strict=True))


def test_auto_takes_it(on_cuda: None) -> None:
    assert backends.fastest(make_grads()) == "cuda"
