"""codec on the Triton backend: the CPU kernels' bytes and bits."""

from __future__ import annotations

import pytest
import torch

from pysmooth.distributed import codec
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels import codec as kernels


def some(n: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x[::7] = 0.0
    x[1::11] = -0.0
    return x


@pytest.mark.parametrize("n", [1, 9, 4099])
@pytest.mark.parametrize("feedback", [False, True])
def test_signs(n: int, feedback: bool) -> None:
    g, e = some(n), some(n, 1) if feedback else None
    found = []
    for module in (codec, kernels):
        out, bits = torch.empty(n), torch.empty(-(-n // 8), dtype=torch.uint8)
        total = module.code_signs(g, e, 0.3, -1.0, out, bits)
        module.subtract_signs(out, torch.tensor(0.25))
        found.append((out, bits, total))
    (out, bits, total), (ours, packed, summed) = found
    assert torch.equal(ours, out)
    assert torch.equal(packed, bits)
    # In float32 within a group of elements on the CPU, in float64 here.
    torch.testing.assert_close(summed, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 9, 4099])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_sums_and_votes(n: int, ranks: int) -> None:
    # Rows behind a header, as in messages: addresses are odd.
    whole = torch.randint(0, 256, (ranks, 5 + -(-n // 8)), dtype=torch.uint8)
    messages, scales = whole[:, 5:], torch.rand(ranks)
    for given in (None, scales):
        out, ours = torch.empty(n), torch.empty(n)
        codec.sum_signs(messages, given, 1 / ranks, out)
        kernels.sum_signs(messages, given, 1 / ranks, ours)
        assert torch.equal(ours, out)
    signs, voted = (torch.zeros(-(-n // 8), dtype=torch.uint8) for _ in range(2))
    codec.vote(messages, n, signs)
    kernels.vote(messages, n, voted)
    assert torch.equal(voted, signs)


@pytest.mark.parametrize(("n", "width"), [(1, 1), (5, 3), (2000, 13), (300, 32), (4, 0)])
def test_packed_numbers(n: int, width: int) -> None:
    numbers = torch.randint(0, 2**width, (n,))
    size = -(-n * width // 8)
    packed, ours = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    codec.pack_bits(numbers, width, packed)
    kernels.pack_bits(numbers, width, ours)
    assert torch.equal(ours, packed)
    assert torch.equal(kernels.unpack_bits(ours, n, width), numbers)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3000, 30), (3000, 1500)])
def test_sums_of_sparse_messages(n: int, k: int) -> None:
    width = (n - 1).bit_length()
    rows = []
    for rank in range(3):
        index = torch.randperm(n, generator=torch.Generator().manual_seed(rank))[:k].sort().values
        marks = torch.zeros(n, dtype=torch.int64)
        marks[index] = 1
        bitmap = n < k * width
        places = torch.zeros(-(-min(k * width, n) // 8), dtype=torch.uint8)
        codec.pack_bits(marks if bitmap else index, 1 if bitmap else width, places)
        rows.append(torch.cat([places, some(k, rank).view(torch.uint8)]))
    messages = torch.stack(rows)
    out, ours = torch.empty(n), torch.full((n,), 7.0)
    codec.sum_top_k(messages, k, codec.Target(out))
    kernels.sum_top_k(messages, k, ours)
    assert torch.equal(ours, out)
