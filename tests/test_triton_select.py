"""Selections, stored parameters, random numbers of the Triton backend: the CPU backend's bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from battery import assert_same_bits, make_params, record_grads, set_grads
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import EF21, EFSGD, RandK, TopK
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels.launch import Launch
from pysmooth.triton_kernels.selection import stretches
from pysmooth.triton_kernels.table import CHUNK, LIST

Make = Callable[..., Any]
Rows = Sequence[Sequence[Tensor | None]]
N = 2 * CHUNK + 77  # three chunks
SHAPES = ((N,), (33,), (5,))


def both(make: Make, params: Callable[[], list[Parameter]], rows: Rows, **kwargs: Any) -> Any:
    """The same steps on both backends, and the same bits; returns the Triton one's optimizer."""
    if {"compressor", "tau"} & set(kwargs):
        kwargs = {"nonfinite": "zero", **kwargs}
    out, kept = [], None
    for backend in ("triton", "cpu"):
        mine = params()
        optimizer = make(mine, backend=backend, **{"lr": 0.1, **kwargs})
        for row in rows:
            set_grads(mine, row)
            optimizer.step()
        states = [optimizer.state[p] for p in mine if p in optimizer.state]
        out.append([*mine, *(s[key] for s in states for key in sorted(s))])
        kept = kept or optimizer
    assert_same_bits(*out)
    return kept


def of(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """Parameters of these shapes."""
    return lambda: make_params(shapes, dtype)


def few_values(shapes: Sequence[Sequence[int]], steps: int = 2) -> list[list[Tensor]]:
    """Gradients of few distinct sizes, many of them zero: ties at every threshold."""
    gen = torch.Generator().manual_seed(5)
    return [
        [(torch.randint(-3, 4, s, generator=gen)).double() for s in shapes] for _ in range(steps)
    ]


SCOPES = {
    "tensor": TopK(ratio=0.01),
    "global": TopK(k=150, scope="global"),
    "block": TopK(ratio=0.1, scope="block", block_size=4096),
    "rand_k": RandK(ratio=0.01, seed=2**40 + 1),
    "rand_k_unscaled": RandK(k=7, scaled=False),
}
METHODS: dict[str, tuple[Make, dict[str, Any]]] = {
    "ef_sgd": (EFSGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "one_pass": (EF21, {"init": "full", "eta": 0.3}),
    "normalized": (EF21, {"normalize": True, "scope": "tensor", "weight_decay": 0.1}),
}


@pytest.mark.parametrize("compressor", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_coordinates_as_on_cpu(name: str, compressor: Any) -> None:
    make, kwargs = METHODS[name]
    rows = record_grads(make_params(SHAPES), 2)
    if kwargs.get("normalize"):  # norms are sums, which add up in another order
        rows = rows[:1]
        optimizer = both(make, of(*SHAPES), rows, compressor=compressor, **{**kwargs, "lr": 0.0})
    else:
        optimizer = both(make, of(*SHAPES), rows, compressor=compressor, **kwargs)
    assert any(
        s.abs().max() > 0 for s in optimizer.state[optimizer.param_groups[0]["params"][0]].values()
    )


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("scope", ["tensor", "global", "block"])
def test_of_equals_the_first_ones(scope: str) -> None:
    compressor = TopK(ratio=0.3, scope=scope, block_size=4096)
    both(EFSGD, of(*SHAPES), few_values(SHAPES), compressor=compressor)


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_zeros_are_never_chosen(ratio: float) -> None:
    (row,) = few_values(SHAPES, 1)
    row[0] = torch.zeros(N, dtype=torch.float64)
    row[0][[5, CHUNK + 1]] = 1.0
    both(EFSGD, of(*SHAPES), [row], compressor=TopK(ratio=ratio))


def test_a_sample_that_misleads_costs_a_second_look() -> None:
    """What is sampled is large, and nothing else: far too few candidates."""
    g = torch.linspace(0.1, 0.2, N, dtype=torch.float64)
    (sampled,) = stretches([0], [N], 0)
    for at in sampled.places:
        g[at : at + 16] = 5.0
    k = len(sampled.places) * 16 + 100
    optimizer = both(EFSGD, of((N,)), [[g]], compressor=TopK(k=k))
    assert optimizer.selections() == (1, 1)
    optimizer = both(EFSGD, of((N,)), record_grads(make_params([(N,)]), 3), compressor=TopK(k=99))
    assert optimizer.selections() == (3, 0)


@pytest.mark.usefixtures("block_sizes")
def test_more_candidates_in_a_chunk_than_a_list_holds() -> None:
    g = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 1e-3
    g[CHUNK : CHUNK + LIST.value + 200] += 1.0
    for k in (LIST.value // 2, LIST.value + 100):
        optimizer = both(EFSGD, of((N,)), [[g]], compressor=TopK(k=k))
        assert optimizer.selections() == (1, 0)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_what_sits_out_is_not_selected_from(scope: str) -> None:
    """Parameters without a gradient, and groups whose learning rate is 0."""

    def make(params: list[Parameter], **kwargs: Any) -> Any:
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.0}]
        return EFSGD(groups, **kwargs)

    shapes = ((N,), (40,), (CHUNK + 3,))
    rows: list[list[Tensor | None]] = [list(r) for r in record_grads(make_params(shapes), 3)]
    rows[1][0] = None
    both(make, of(*shapes), rows, compressor=TopK(ratio=0.01, scope=scope))


def test_dtypes_are_compared_in_one_order() -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)

    def params() -> list[Parameter]:
        return [make_params([(900,)], d, seed=i)[0] for i, d in enumerate(dtypes)]

    rows = record_grads(params(), 2)
    both(EFSGD, params, rows, compressor=TopK(ratio=0.05, scope="global"))
    both(EFSGD, params, rows, compressor=TopK(ratio=0.05))


def test_what_is_not_finite_comes_first() -> None:
    """Sums of finite gradients may overflow."""
    g = torch.full((N,), 3e38, dtype=torch.float64)
    g[: N // 2] = 1.0
    both(EFSGD, of((N,)), [[g]] * 2, compressor=TopK(k=20), lr=1e30)


@pytest.mark.parametrize("kind", ["strided", "transposed"])
def test_layouts(kind: str) -> None:
    def params() -> list[Parameter]:
        x = torch.randn(90, 100, 2, generator=torch.Generator().manual_seed(1))
        return [
            Parameter(x[..., 0] if kind == "strided" else x.transpose(0, 1).reshape(100, 180).t())
        ]

    for compressor in (TopK(ratio=0.01), TopK(k=3, scope="block", block_size=512), RandK(k=9)):
        both(EFSGD, params, record_grads(params(), 2), compressor=compressor)


@pytest.mark.parametrize("size", [16384, 32768, 1])
def test_block_sizes(size: int) -> None:
    both(
        EFSGD,
        of((40000 if size > 1 else 20,)),
        record_grads(make_params([(40000 if size > 1 else 20,)]), 1),
        compressor=TopK(ratio=0.001, scope="block", block_size=size),
    )


def test_other_block_sizes_are_refused() -> None:
    (p,) = make_params([(5,)])
    compressor = TopK(k=1, scope="block", block_size=100)
    optimizer = EFSGD([p], 0.1, compressor=compressor, backend="triton")
    p.grad = torch.ones(5)
    with pytest.raises(pysmooth.BackendError, match="block_size 100 does not divide 32768"):
        optimizer.step()
    assert not optimizer.state


def test_launches_do_not_depend_on_tensors_or_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some units settle with the first digit, some with none: the same launches."""
    calls: list[str] = []
    monkeypatch.setattr(Launch, "__call__", lambda x, _: calls.append(x.spec.kernel.__name__))
    counts = set()
    for shapes in (((N,),), ((N,), (CHUNK + 1,), (2 * CHUNK,))):
        params = make_params(shapes)
        optimizer = EFSGD(params, compressor=TopK(k=5), lr=0.1, nonfinite="zero", backend="triton")
        for row in (*record_grads(params, 1), *few_values(shapes, 1)):
            calls.clear()
            set_grads(params, row)
            optimizer.step()
            counts.add(tuple(calls))
    (one,) = counts
    assert one == (
        *("finalize", "sample", "begin_select", "source"),
        *("narrow", "settle") * 3,
        *("ties", "selected"),
    )


# ---- how parameters are stored -------------------------------------------------------------------

STORED = {
    "master": {"master_weights": True},
    "kahan": {"kahan": True},
    "stochastic": {"stochastic_rounding": True},
}
STORING: dict[str, tuple[Make, dict[str, Any]]] = {
    "sgd": (pysmooth.ClipSGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (pysmooth.AdamW, {"lr": 1e-3, "amsgrad": True}),
    "adam_low": (pysmooth.Adam, {"lr": 1e-3, "state_dtype": torch.bfloat16}),
    "top_k": (EFSGD, {"compressor": TopK(ratio=0.02), "weight_decay": 0.1}),
    "top_k_low": (EFSGD, {"compressor": TopK(ratio=0.02), "residual": "bf16", "momentum": 0.9}),
    "one_pass": (EF21, {"compressor": TopK(ratio=0.02), "init": "full"}),
    "natural": (EFSGD, {"compressor": pysmooth.NaturalCompression(seed=9), "residual": "bf16"}),
}


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("name", STORING)
def test_stored_parameters_have_the_bits_of_cpu(name: str, storage: str) -> None:
    make, kwargs = STORING[name]
    shapes = ((CHUNK + 5,), (33,), ())
    rows = record_grads(make_params(shapes, torch.bfloat16), 3)
    both(make, of(*shapes, dtype=torch.bfloat16), rows, **{**kwargs, **STORED[storage]})


@pytest.mark.parametrize("storage", ["master", "kahan"])
def test_float16_and_float32_beside_each_other(storage: str) -> None:
    def params() -> list[Parameter]:
        return [*make_params([(50,)], torch.float16), *make_params([(50,)])]

    both(pysmooth.Lion, params, record_grads(params(), 3), weight_decay=0.1, **STORED[storage])


def test_kahan_beside_overflow() -> None:
    def params() -> list[Parameter]:
        return [Parameter(torch.tensor([6e4, -6e4, 1.0, 0.0], dtype=torch.float16))]

    g = torch.tensor([-6e4, 6e4, 1e-7, -0.0], dtype=torch.float64)
    both(pysmooth.ClipSGD, params, [[g]] * 3, lr=1.0, kahan=True)


def test_stored_parameters_that_are_strided() -> None:
    def params() -> list[Parameter]:
        x = make_params([(30, 8)], torch.bfloat16)[0].detach()
        return [Parameter(x[:, ::2]), Parameter(x.t().contiguous().t())]

    for storage in STORED.values():
        both(pysmooth.Signum, params, record_grads(params(), 2), **storage)


# ---- random numbers ------------------------------------------------------------------------------


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_natural_compression_draws_as_on_cpu(dtype: torch.dtype) -> None:
    compressor = pysmooth.NaturalCompression(seed=2**40 + 3)
    shapes = ((CHUNK + 21,), (7, 3))
    rows = record_grads(make_params(shapes, dtype), 2)
    both(EFSGD, of(*shapes, dtype=dtype), rows, compressor=compressor)
    both(EF21, of(*shapes, dtype=dtype), rows, compressor=compressor, eta=0.5)


def test_natural_compression_of_special_numbers() -> None:
    values = [1e-45, 2e-38, 3.4e38, -3.4e38, 0.0, -0.0, 1.0, 1.5, -0.75]
    g = torch.tensor(values, dtype=torch.float32).double()
    both(EFSGD, of((9,)), [[g]] * 3, compressor=pysmooth.NaturalCompression(seed=1), lr=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-44, 1e36])
def test_qsgd_draws_as_on_cpu(dtype: torch.dtype, scale: float) -> None:
    """One tensor of a size whose norm both backends add up to the same bits."""
    g = torch.zeros(64, dtype=torch.float64)
    g[:9] = torch.tensor([3.0, -4.0, 0.0, 12.0, 0.5, -0.25, 1.0, 2.0, -1.0]) * scale
    g = g.to(dtype).double()
    start = lambda: [Parameter(torch.ones(64, dtype=dtype))]  # noqa: E731
    both(EFSGD, start, [[g]], compressor=pysmooth.QSGD(17, seed=5), lr=0.5)
    both(EF21, start, [[g]], compressor=pysmooth.QSGD(17, seed=5), init="zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_noise_as_on_cpu(dtype: torch.dtype) -> None:
    """What is not clipped has no factor, so that no sum enters."""
    rows = record_grads(make_params([(CHUNK + 21,), (6, 5)], dtype), 2)
    kwargs = {"tau": math.inf, "noise_std": 0.3, "seed": 2**40 + 5}
    both(pysmooth.Clip21, of((CHUNK + 21,), (6, 5), dtype=dtype), rows, **kwargs)
    kwargs["beta_hat"] = 0.5
    both(pysmooth.Clip21SGD2M, of((CHUNK + 21,), (6, 5), dtype=dtype), rows, **kwargs)
