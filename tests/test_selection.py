"""Top-k inside a step: exact, whatever the values are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import BACKENDS, assert_same_bits, set_grads
from torch import Tensor
from torch.nn import Parameter

from pysmooth import EF21, EFSGD, TopK, _cpu

every_backend = pytest.mark.parametrize("backend", BACKENDS)
KINDS = ("all equal", "few", "in one place", "two values", "ties", "heavy")


def adversarial(kind: str, n: int) -> Tensor:
    """Gradients on which a sample misleads, or everything is equal."""
    gen = torch.Generator().manual_seed(1)
    if kind == "all equal":
        return torch.ones(n) * (torch.rand(n, generator=gen) > 0.5).float().mul(2).sub(1)
    if kind == "few":
        return torch.where(torch.arange(n) < 100, torch.arange(n).float(), 0.0)
    if kind == "in one place":
        g = torch.randn(n, generator=gen) * 1e-4
        g[1000 : 1000 + n // 50] += 1
        return g
    if kind == "ties":  # some dozens at the threshold, over several chunks
        return torch.randn(n, generator=gen).mul(64).round().div(64)
    if kind == "two values":
        return torch.where(torch.rand(n, generator=gen) < 0.02, 1.0, 0.5)
    return torch.exp(4 * torch.randn(n, generator=gen))  # heavy tails


@pytest.mark.parametrize(
    "kind", ["all equal", "few", "in one place", "two values", "ties", "heavy"]
)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])  # None: some of each
@pytest.mark.parametrize("cls", [EFSGD, EF21])
def test_selection_is_exact(cls: Any, kind: str, scope: Any, dtype: torch.dtype | None) -> None:
    results = []
    dtypes = [dtype] * 3 if dtype else [torch.float32, torch.float64, torch.float64]
    best = _cpu.isa()
    runs = [("eager", 2, best), ("cpu", 3, best), *(("cpu", 1, isa) for isa in _cpu.isa_levels())]
    for backend, threads, isa in runs:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        _cpu.set_isa(isa)
        params = [
            Parameter(torch.zeros(n, dtype=d))
            for n, d in zip((100_000, 40_001, 70), dtypes, strict=True)
        ]
        optimizer = cls(params, 0.1, TopK(ratio=0.01, scope=scope), backend=backend)
        for _ in range(2):
            set_grads(params, [adversarial(kind, p.numel()).to(p.dtype) for p in params])
            optimizer.step()
        torch.set_num_threads(before)
        _cpu.set_isa(best)
        kept = [value for p in params for value in optimizer.state[p].values()]
        results.append([p.detach() for p in params] + kept)
        if backend == "cpu":
            made, again = optimizer.selections()
            assert made == (2 if scope == "global" else 6)
            assert again > 0 if kind == "all equal" else again <= made
            assert again == 0 or kind != "ties"
    for result in results[1:]:
        assert_same_bits(results[0], result)


def test_ordinary_gradients_need_no_second_look() -> None:
    params = [Parameter(torch.zeros(60_000)), Parameter(torch.zeros(300, 300))]
    optimizer = EFSGD(params, 0.1, TopK(ratio=0.01))
    gen = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        optimizer.step()
    assert optimizer.selections() == (40, 0)


def test_zeros_are_never_selected() -> None:
    p = Parameter(torch.full((9000,), -0.0))
    p.grad = torch.zeros(9000)
    p.grad[5] = 1.0
    optimizer = EFSGD([p], 0.1, TopK(k=3))
    optimizer.step()
    assert torch.count_nonzero(p) == 1
    assert bool(torch.signbit(p.detach()[:5]).all())
