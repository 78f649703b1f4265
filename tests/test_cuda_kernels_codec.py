"""codec in CUDA kernels, emulated: the CPU kernels' bytes and bits, in any order of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from messages import KINDS, SENT, coded, same_bits, values
from simt import emulated

from pysmooth.compressors import QSGD, Compressor, ScaledSign, TopK
from pysmooth.distributed import codec, cuda_codec
from pysmooth.distributed.wire import Draw, Source, format_of

SIZES = [1, 9, 63, 65, 257, 1000, 8193]


@pytest.fixture
def by_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """From its call on messages are the emulated kernels', in some order of threads and blocks."""
    lib = emulated.kernels()

    def turn(order: int = 0, resident: int = 1, *, races: bool = False) -> None:
        monkeypatch.setattr(codec, "_native", lambda x: None)
        monkeypatch.setattr(codec, "_modules", lambda x: [cuda_codec])
        monkeypatch.setattr(cuda_codec, "cuda_module", emulated.module)
        lib.runtime_options(order, resident, int(races))

    yield turn
    lib.runtime_options(0, 1, 0)


@pytest.mark.parametrize("n", [1, 9, 63, 4099, 40_001])
@pytest.mark.parametrize("feedback", [False, True])
def test_signs(n: int, feedback: bool, by_cuda: Callable[..., None]) -> None:
    """The sum of |x| as well, in the CPU's order."""
    found = []
    for turn in (lambda: None, lambda: by_cuda(2, 3)):
        turn()
        g, e = values(n), values(n, 1) if feedback else None
        out, bits = torch.empty(n), torch.full((-(-n // 8) + 1,), 9, dtype=torch.uint8)
        total = codec.code_signs(g, e, 0.3, -1.0, out, bits[:-1])
        alone = torch.zeros(-(-n // 8), dtype=torch.uint8)
        codec.code_signs(g, e, 0.3, -1.0, None, alone)
        assert torch.equal(alone, bits[:-1])
        codec.subtract_signs(out, torch.tensor(0.25))
        found.append((out, bits, total))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("n", [1, 9, 4099])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_sums_and_votes(n: int, ranks: int, by_cuda: Callable[..., None]) -> None:
    whole = torch.randint(0, 256, (ranks, 5 + -(-n // 8)), dtype=torch.uint8)
    messages, scales = whole[:, 5:], torch.rand(ranks)
    found = []
    for turn in (lambda: None, by_cuda):
        turn()
        sums = []
        for given in (None, scales):
            room = torch.full((n + 3,), 7.0)  # at one address that is aligned, and at another
            codec.sum_signs(messages, given, 1 / ranks, room[1:-2])
            codec.sum_signs(messages, given, 1 / ranks, out := torch.empty(n))
            assert torch.equal(out, room[1:-2])
            sums.append(room)
        signs = torch.full((-(-n // 8) + 1,), 9, dtype=torch.uint8)
        codec.vote(messages, n, signs[:-1])
        found.append((*sums, signs))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("compressor", [ScaledSign(), *SENT], ids=repr)
def test_messages(compressor: Compressor, n: int, by_cuda: Callable[..., None]) -> None:
    """Bytes, what is left, and sums over ranks: the CPU kernels' to the bit."""
    expected = coded(compressor, n)
    by_cuda(n % 3, 2)
    for ours, theirs in zip(coded(compressor, n), expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compressor", [ScaledSign(), *SENT], ids=repr)
def test_other_numbers(compressor: Compressor, kind: str, by_cuda: Callable[..., None]) -> None:
    expected = coded(compressor, 1500, kind, feedback=False, ranks=2)
    by_cuda(1)
    found = coded(compressor, 1500, kind, feedback=False, ranks=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("compressor", [ScaledSign(), *SENT], ids=repr)
def test_no_race_in_any_order(
    compressor: Compressor, order: int, by_cuda: Callable[..., None]
) -> None:
    expected = coded(compressor, 2100, ranks=2)
    by_cuda(order, 3, races=True)
    for ours, theirs in zip(coded(compressor, 2100, ranks=2), expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize(
    "compressor",
    [QSGD(levels=15, scope="block", block_size=40_001), TopK(ratio=0.01), TopK(ratio=0.4)],
    ids=repr,
)
def test_several_blocks(compressor: Compressor, by_cuda: Callable[..., None]) -> None:
    """Units of several chunks; digits that several blocks count."""
    expected = coded(compressor, 100_000, ranks=2)
    by_cuda(2, 4)
    for ours, theirs in zip(coded(compressor, 100_000, ranks=2), expected, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("compressor", [ScaledSign(), *SENT], ids=repr)
def test_what_is_not_finite_is_told(compressor: Compressor, by_cuda: Callable[..., None]) -> None:
    by_cuda()
    form, n = format_of(compressor), 2100
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1030, n - 1):
            g = values(n)
            g[place] = bad
            message = torch.zeros(form.size(n), dtype=torch.uint8)
            assert not form.encode(Source(g), Draw(0, 1, 2), torch.empty(n), message)


@pytest.mark.usefixtures("by_cuda")
def test_an_argument_that_no_launch_has() -> None:
    with pytest.raises(TypeError, match="no argument sums_up"):
        emulated.module().vote(0, sums_up=3)
