"""More elements than 32 bits count, and sums of a billion."""

from __future__ import annotations

import math

import pytest
import torch

import pysmooth


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """Four GiB of bfloat16; the last element is reached, and by its own index."""
    p = torch.nn.Parameter(torch.ones(2**31 + 3, dtype=torch.bfloat16))
    p.grad = torch.tensor([0.5], dtype=torch.bfloat16).expand(p.shape)
    pysmooth.ClipSGD([p], lr=0.5, backend="cpu").step()
    for part in p.detach().split(2**28):
        assert bool((part == 0.75).all())
    p.grad = p.detach()  # in linear memory
    pysmooth.ClipSGD([p], lr=0.5, backend="cpu").step()
    for part in p.detach().split(2**28):
        assert bool((part == 0.375).all())


@pytest.mark.slow
def test_norm_of_a_billion_elements() -> None:
    """Against the exact sum; the bound is that of tests/test_norm_edges.py, at any length."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(3))
    exact = math.fsum(x * x for x in block.tolist())
    for count in (1, 1000):
        got = float(pysmooth.get_total_norm([block.expand(count, -1)]))
        assert got == pytest.approx(math.sqrt(exact * count), rel=127 * 2**-24, abs=0)
