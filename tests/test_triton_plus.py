"""EF21+, scales per block, clips by rows on the Triton backend: the CPU backend's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import assert_same_bits, make_params, record_grads, set_grads
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import EF21, EFSGD, QSGD, EF21Plus, RandK, TopK
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels.launch import Launch
from pysmooth.triton_kernels.table import CHUNK

SHAPES = ((2 * CHUNK + 77,), (33,), (5, 4), (0, 3))


def both(make: Any, rows: list[list[Tensor]], params: Any, **kwargs: Any) -> list[Tensor]:
    """The same steps on both backends, and the same bits; returns what came out."""
    out = []
    for backend in ("triton", "cpu"):
        mine = params()
        optimizer = make(mine, backend=backend, **{"lr": 0.1, "nonfinite": "zero", **kwargs})
        assert optimizer.resolved_backend == backend
        for row in rows:
            set_grads(mine, row)
            optimizer.step()
        states = [optimizer.state[p] for p in mine if p in optimizer.state]
        out.append([*mine, *(s[key] for s in states for key in sorted(s))])
    assert_same_bits(*out)
    return out[0]


def whole_numbers(shapes: Any) -> Any:
    """Small integers: their squares add up to the same number in any order and precision."""
    gen = torch.Generator().manual_seed(7)
    return [[torch.randint(-4, 5, s, generator=gen).double() for s in shapes]]


# ---- EF21+ ---------------------------------------------------------------------------------------

SELECTING = {
    "tensor": TopK(ratio=0.01),
    "global": TopK(k=150, scope="global"),
    "block": TopK(ratio=0.1, scope="block", block_size=4096),
    "rand_k": RandK(ratio=0.01, seed=2**40 + 1),
    "rand_k_unscaled": RandK(k=7, scaled=False),
}
DENSE = {
    "identity": pysmooth.Identity(),
    "threshold": pysmooth.HardThreshold(0.5),
    "natural": pysmooth.NaturalCompression(seed=3),
}


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("eta", [None, 0.3])
@pytest.mark.parametrize("compressor", [*SELECTING.values(), *DENSE.values()], ids=repr)
def test_plus_has_the_bits_of_cpu(compressor: Any, eta: float | None) -> None:
    """The second gradient is far from the first and the third near: each message is closer once."""
    rows = record_grads(make_params(SHAPES), 3)
    rows[2] = [1.01 * g for g in rows[1]]
    kwargs = {"compressor": compressor, "eta": eta, "weight_decay": 0.1, "init": "full"}
    both(EF21Plus, rows, lambda: make_params(SHAPES), **kwargs)


@pytest.mark.parametrize("compressor", [TopK(ratio=0.05), pysmooth.Identity()], ids=repr)
def test_plus_sends_either_message(compressor: Any) -> None:
    """The choice is really made: per tensor, and both ways."""
    (p, q), estimates = make_params([(100,), (100,)]), []
    for make in (EF21Plus, EF21):
        mine = [Parameter(p.detach().clone()), Parameter(q.detach().clone())]
        optimizer = make(mine, 0.1, compressor=compressor, init="full", backend="triton")
        set_grads(mine, [torch.ones(100).double()] * 2)
        optimizer.step()
        sparse = torch.zeros(100).double()
        sparse[3] = 1.0
        set_grads(mine, [sparse, torch.full((100,), 1.01).double()])
        optimizer.step()
        estimates.append([optimizer.state[x]["grad_estimate"] for x in mine])
    same = [torch.equal(a, b) for a, b in zip(*estimates, strict=True)]
    assert same == ([False, True] if isinstance(compressor, TopK) else [True, True])


@pytest.mark.parametrize("compressor", [TopK(ratio=0.02), pysmooth.ScaledSign()], ids=repr)
@pytest.mark.parametrize("normalize", [False, True])
def test_plus_in_other_dtypes_and_layouts(compressor: Any, normalize: bool) -> None:
    """Sums differ in the last place: so may what is made of them."""

    def params() -> list[Parameter]:
        gen = torch.Generator().manual_seed(1)
        x = torch.randn(30, 40, 2, generator=gen)
        kinds = (x[..., 0], x[..., 1].t(), x[0].double(), torch.view_as_complex(x[1].clone()))
        return [Parameter(k.clone() if i > 1 else k) for i, k in enumerate(kinds)]

    rows = [[torch.randn(p.shape, dtype=p.dtype) for p in params()] for _ in range(3)]
    results = []
    for backend in ("triton", "cpu"):
        mine = params()
        optimizer = EF21Plus(mine, 0.1, compressor, normalize=normalize, backend=backend)  # type: ignore[arg-type]
        for row in rows:
            for p, g in zip(mine, row, strict=True):
                p.grad = g.clone()
            optimizer.step()
        results.append([*mine, *(optimizer.state[p]["grad_estimate"] for p in mine)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_plus_with_stored_parameters() -> None:
    for storage in ({"master_weights": True}, {"kahan": True}, {"stochastic_rounding": True}):
        shapes = ((900,), (33,))
        rows = record_grads(make_params(shapes, torch.bfloat16), 3)
        kwargs = {"compressor": TopK(ratio=0.02), "eta": 0.3, **storage}
        both(EF21Plus, rows, lambda: make_params(shapes, torch.bfloat16), **kwargs)  # noqa: B023


# ---- QSGD(scope="block") -------------------------------------------------------------------------


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("size", [1, 8, 64, 1024, CHUNK, 4 * CHUNK])
def test_blocks_have_scales_of_their_own(size: int) -> None:
    """One step from 0: what is compressed are the numbers themselves, whose sums are exact."""
    shapes = ((2 * CHUNK + 77,), (33,), (5, 4)) if size > 8 else ((CHUNK + 21,), (33,))
    compressor = QSGD(7, scope="block", block_size=size, seed=2**40 + 3)
    rows = whole_numbers(shapes)
    start = lambda: [Parameter(torch.zeros(s)) for s in shapes]  # noqa: E731
    for make, kwargs in ((EFSGD, {"lr": 1.0}), (EF21, {}), (EF21Plus, {}), (EF21, {"eta": 1.0})):
        both(make, rows, start, compressor=compressor, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_blocks_in_other_dtypes(dtype: torch.dtype) -> None:
    compressor = QSGD(5, scope="block", block_size=256, seed=4)
    shapes = ((900,), (33,))
    rows = whole_numbers(shapes)
    if dtype.is_complex:
        rows = [[torch.complex(g, g.flip(0)) for g in rows[0]]]
    start = lambda: [Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]  # noqa: E731
    both(EFSGD, rows, start, compressor=compressor, lr=1.0)


def test_blocks_step_after_step() -> None:
    """Sums differ in the last place: so, rarely, does what is drawn."""
    shapes = ((3000,), (40, 30))
    results = []
    for backend in ("triton", "cpu"):
        mine = make_params(shapes)
        mine[1] = Parameter(mine[1].detach().t())
        compressor = QSGD(15, scope="block", block_size=128)
        optimizer = EFSGD(mine, 0.1, compressor=compressor, momentum=0.9, backend=backend)  # type: ignore[arg-type]
        for row in record_grads(mine, 4):
            set_grads(mine, row)
            optimizer.step()
        results.append([*mine, *(optimizer.state[p]["residual"] for p in mine)])
    for a, b in zip(*results, strict=True):
        close = torch.isclose(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)
        assert close.float().mean() > 0.99


def test_launches_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch makes all scales; a pass that would change nothing is left out."""
    calls: list[str] = []
    monkeypatch.setattr(Launch, "__call__", lambda x, _: calls.append(x.spec.kernel.__name__))
    for make, want in (
        (EFSGD, ["finalize", "source", "block_scales", "apply"]),
        (EF21, ["finalize", "block_scales", "source", "apply"]),
    ):
        params = make_params(SHAPES)
        compressor = QSGD(4, scope="block")
        kwargs: dict[str, Any] = {"init": "zero"} if make is EF21 else {}
        optimizer = make(
            params, 0.1, compressor=compressor, nonfinite="zero", backend="triton", **kwargs
        )
        calls.clear()
        set_grads(params, record_grads(params, 1)[0])
        optimizer.step()
        assert calls == want


# ---- clip="agc" ----------------------------------------------------------------------------------

CLIPPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (pysmooth.ClipSGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "ascent": (pysmooth.ClipSGD, {"maximize": True}),
    "adam": (pysmooth.AdamW, {"lr": 1e-3}),
    "top_k": (EFSGD, {"compressor": TopK(ratio=0.02)}),
    "block": (EFSGD, {"compressor": TopK(k=3, scope="block", block_size=512)}),
    "rand_k": (EFSGD, {"compressor": RandK(k=9)}),
    "threshold": (EFSGD, {"compressor": pysmooth.HardThreshold(0.01), "momentum": 0.9}),
}
ROWS = ((5000, 3), (3, CHUNK + 1), (2, 16, 9), (CHUNK + 5,), (40,), (), (0, 4))


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("name", CLIPPED)
def test_rows_have_the_coefficients_of_cpu(name: str) -> None:
    """One step of whole numbers, whose squares add up to the same in any order."""
    make, kwargs = CLIPPED[name]

    def params() -> list[Parameter]:
        (start,) = whole_numbers(ROWS)
        out = [Parameter((3 * g).float()) for g in start]
        out[2] = Parameter(out[2].detach().transpose(0, 2).contiguous().transpose(0, 2))
        return out

    rows = whole_numbers(ROWS)
    rows[0][2] = rows[0][2].transpose(0, 1).contiguous().transpose(0, 1)
    both(make, rows, params, clip="agc", agc_factor=0.5, nonfinite="skip", **kwargs)


def test_rows_of_a_transposed_matrix_lie_across() -> None:
    start = lambda: [Parameter(torch.arange(60.0).view(12, 5).t())]  # noqa: E731
    rows = [[torch.arange(60.0).view(5, 12).double() - 30]]
    out = both(pysmooth.ClipSGD, rows, start, clip="agc", nonfinite="skip")
    assert (out[0] != start()[0]).any(dim=1).all()
