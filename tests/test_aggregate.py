"""Sums over clients' vectors: kernels and torch give the same bits, in any order of arrival."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pysmooth import federated as fed
from pysmooth import get_total_norm
from pysmooth.engine.backends import available_backends, native_module
from pysmooth.federated import aggregate
from pysmooth.reference.aggregate import tree_sum

needs_native = pytest.mark.skipif("cpu" not in available_backends(), reason="no native module")
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch to the eager twin."""
    return lambda: monkeypatch.setattr(aggregate, "_native", lambda *tensors: None)


def drawn(n: int, size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(n + size)
    scales = torch.logspace(-6, 6, n, dtype=dtype).unsqueeze(1)
    vectors = torch.randn(n, size, dtype=dtype, generator=generator) * scales
    return list(vectors), torch.rand(n, generator=generator, dtype=torch.float64).tolist()


def both(vectors: list[Tensor], weights: list[float]) -> tuple[Tensor, float, Tensor]:
    out = torch.full_like(vectors[0], float("nan"))
    dots = torch.arange(len(vectors), dtype=torch.float64)
    norm = aggregate.weighted_sum(vectors, weights, out)
    aggregate.add_dots(vectors, vectors[-1], dots)
    return out, norm, dots


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "size"),
    [*((n, 37) for n in range(1, 18)), (100, 1023), (3, 0), (3, 1), (5, 8192), (6, 70_001)],
)
def test_kernels_and_torch_give_the_same_bits(
    n: int, size: int, dtype: torch.dtype, torch_alone: Any
) -> None:
    vectors, weights = drawn(n, size, dtype)
    results = []
    native, threads, level = native_module(), torch.get_num_threads(), native_module().isa()
    try:
        for isa, count in itertools.product(native.isa_levels(), (1, 2)):
            native.set_isa(isa)
            torch.set_num_threads(count)
            results.append(both(vectors, weights))
            assert results[-1][1] == float(get_total_norm([results[-1][0]]))
    finally:
        native.set_isa(level)
        torch.set_num_threads(threads)
    torch_alone()
    results.append(both(vectors, weights))
    for out, norm, dots in results:
        assert torch.equal(out, results[-1][0])
        assert torch.equal(dots, results[-1][2])
        assert norm == results[-1][1]
    wide = torch.stack(vectors).double()
    exact = (wide * torch.tensor(weights, dtype=torch.float64).unsqueeze(1)).sum(0)
    scale = float(exact.abs().max()) if size else 1.0
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(dots - torch.arange(n), (wide * wide[-1]).sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 250_000])  # one stretch on disk, and several
def test_whoever_came_first_held_or_on_disk(dtype: torch.dtype, size: int, tmp_path: Any) -> None:
    vectors, weights = drawn(11, size, dtype)
    factors = dict(enumerate(weights))
    results = []
    for seed, folder in itertools.product(range(2), (None, tmp_path)):
        uploads = fed.Uploads(size, dtype, folder=folder)
        for i in torch.randperm(11, generator=torch.Generator().manual_seed(seed)).tolist():
            uploads.add(i, (vectors[i],))
        results.append((*uploads.combine(factors), uploads.dots(vectors[0])))
        some, _ = uploads.combine({3: 2.0, 7: -1.0})
        expected = (2.0 * vectors[3].double() - vectors[7].double()).to(dtype)
        assert torch.equal(some, expected)
    for total, norm, dots in results[1:]:
        assert torch.equal(total, results[0][0])
        assert norm == results[0][1]
        assert torch.equal(dots, results[0][2])


def test_what_lies_strided_or_negated_in_memory_is_what_it_shows() -> None:
    uploads = fed.Uploads(4, torch.float32)
    strided = torch.arange(12.0).view(4, 3)[:, 1]
    negative = torch.complex(torch.zeros(4), torch.ones(4)).conj().imag
    assert negative.is_neg()
    for i, v in enumerate((strided, negative)):
        uploads.add(i, (v,))
    total, _ = uploads.combine(dict.fromkeys(range(2), 1.0))
    assert torch.equal(total, strided - 1)


def test_tensors_without_plain_memory_are_refused() -> None:
    uploads = fed.Uploads(4, torch.float32)
    for v in (torch.ones(4).to_sparse(), torch.ones(4, device="meta")):
        with pytest.raises(fed.UploadError, match="not dense"):
            uploads.add(0, (v,))
    assert len(uploads) == 0
    with pytest.raises(ValueError, match="no client is left"):
        uploads.combine({})


def test_tree_sum() -> None:
    for n in range(1, 20):
        x = torch.arange(3 * n, dtype=torch.float64).view(n, 3)
        assert torch.equal(tree_sum(x), x.sum(0))
    a, b, c = (torch.randn(1, 2, dtype=torch.float64) for _ in range(3))
    assert torch.equal(tree_sum(torch.cat([a, b, c])), ((a + b) + c)[0])
    assert torch.equal(tree_sum(torch.empty(0, 3)), torch.zeros(3))


@needs_native
def test_the_kernel_refuses_what_does_not_fit() -> None:
    native = native_module()
    with pytest.raises(ValueError, match="number of clients"):
        native.sum_clients([], [], False, 0, 0, 1)
    with pytest.raises(ValueError, match="as many as clients"):
        native.sum_clients([0, 0], [1.0], False, 0, 0, 1)
