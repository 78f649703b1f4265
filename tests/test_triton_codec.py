"""codec on the Triton backend: the CPU kernels' bytes and bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from messages import KINDS, SENT, coded, same_bits, values

from pysmooth.compressors import QSGD, Compressor, TopK
from pysmooth.distributed import codec
from pysmooth.distributed.wire import Draw, Source, Target, format_of
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels import messages as kernels


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


SIZES = [1, 9, 65, 1000, 1025, 9001]


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on messages are Triton's."""

    def turn() -> None:
        monkeypatch.setattr(codec, "_native", lambda x: None)
        monkeypatch.setattr(codec, "_modules", lambda x: [kernels])

    return turn


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("compressor", SENT, ids=repr)
def test_messages(compressor: Compressor, n: int, by_triton: Callable[[], None]) -> None:
    """Bytes, what is left, and sums over ranks: the CPU kernels' to the bit."""
    expected = coded(compressor, n)
    by_triton()
    for ours, theirs in zip(coded(compressor, n), expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compressor", SENT, ids=repr)
def test_other_numbers(compressor: Compressor, kind: str, by_triton: Callable[[], None]) -> None:
    expected = coded(compressor, 1500, kind, feedback=False, ranks=2)
    by_triton()
    found = coded(compressor, 1500, kind, feedback=False, ranks=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert same_bits(ours, theirs)


def test_units_of_several_chunks(by_triton: Callable[[], None]) -> None:
    """Of a block that is longer than what one program sums up; the last one is shorter."""
    compressor = QSGD(levels=15, scope="block", block_size=40_001)
    expected = coded(compressor, 100_000, ranks=1)
    by_triton()
    for ours, theirs in zip(coded(compressor, 100_000, ranks=1), expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("compressor", SENT, ids=repr)
def test_what_is_not_finite_is_told(compressor: Compressor, by_triton: Callable[[], None]) -> None:
    by_triton()
    form, n = format_of(compressor), 2100
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1030, n - 1):
            g = values(n)
            g[place] = bad
            message = torch.zeros(form.size(n), dtype=torch.uint8)
            assert not form.encode(Source(g), Draw(0, 1, 2), torch.empty(n), message)


@pytest.mark.parametrize("ratio", [0.01, 0.4])
def test_sums_of_what_another_backend_sent(ratio: float, by_triton: Callable[[], None]) -> None:
    """Places say what they say, whoever wrote them: more than one chunk of some of them."""
    n, compressor = 20_000, TopK(ratio=ratio)
    form = format_of(compressor)
    messages = torch.zeros(2, form.size(n), dtype=torch.uint8)
    for rank, message in enumerate(messages):
        x = values(n, rank)
        x[: n // 2] *= 1e-3  # most of what is chosen lies in the second half
        form.encode(Source(x), Draw(rank, 0, 0), torch.empty(n), message)
    expected, found = torch.empty(n), torch.empty(n)
    form.decode(messages, Draw(0, 0, 0), Target(expected, 0.5))
    by_triton()
    form.decode(messages, Draw(0, 0, 0), Target(found, 0.5))
    assert same_bits(found, expected)
