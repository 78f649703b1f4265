"""codec: kernels and plain torch write the same messages, and these say what they should."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pysmooth
from pysmooth import compressors
from pysmooth.compressors import Compressor
from pysmooth.distributed import codec
from pysmooth.distributed.schemes import index_bytes
from pysmooth.distributed.wire import Draw, Source, Target, format_of
from pysmooth.engine import backends
from pysmooth.reference import codec as eager

SIZES = [1, 2, 7, 8, 63, 64, 65, 1000, 8192, 8193, 40_000]


@pytest.fixture(params=backends.native_module().isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native = backends.native_module()
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def values(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    x[torch.rand(n, generator=g) < 0.1] = 0.0
    x[torch.rand(n, generator=g) < 0.05] *= -0.0
    return x


@pytest.mark.parametrize("n", SIZES)
def test_signs(n: int, isa: str) -> None:
    g, e = values(n, 1), values(n, 2)
    out, bits = torch.empty(n), torch.full((-(-n // 8),), 255, dtype=torch.uint8)
    total = codec.code_signs(g, e, 0.1, 1.0, out, bits)
    x = eager.combine(g, e, 0.1, 1.0)
    assert torch.equal(out, x)
    assert torch.equal(bits, eager.signs_of(x))
    torch.testing.assert_close(total, x.double().abs().sum(), rtol=1e-6, atol=0)
    scale = torch.tensor(0.37)
    codec.subtract_signs(out, scale)
    eager.subtract_signs(x, scale)
    assert torch.equal(out, x)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_sums_of_signs(n: int, ranks: int, isa: str) -> None:
    bits = torch.stack([eager.signs_of(values(n, seed)) for seed in range(ranks)])
    scales = torch.rand(ranks)
    out = torch.empty(n)
    codec.sum_signs(bits, scales, 0.5, out)
    assert torch.equal(out, eager.sum_signs(bits, scales, n) * 0.5)
    signs = torch.empty_like(bits[0])
    codec.vote(bits, n, signs)
    assert torch.equal(signs, eager.signs_of(eager.sum_signs(bits, None, n)))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "one", "misleading"])
def test_top_k(n: int, ratio: float, kind: str, isa: str) -> None:
    g, e = values(n, 1), values(n, 2)
    if kind == "ties":
        g, e = g.sign(), torch.zeros(n)
    elif kind == "zeros":
        g, e = torch.zeros(n), torch.zeros(n)
    elif kind == "one":
        g, e = torch.zeros(n), torch.zeros(n)
        g[n // 2] = -3.0
    elif kind == "misleading":  # all that is large lies together, where no sample need look
        g = torch.full((n,), 1e-3)
        g[: max(1, n // 300)] = 5.0
    k = max(1, int(ratio * n))
    out = torch.empty(n)
    index, chosen, finite = codec.largest(g, e, 1.0, -1.0, k, out)
    assert finite
    x = eager.combine(g, e, 1.0, -1.0)
    expected = eager.top_k(x, k)
    assert torch.equal(index, expected)
    assert torch.equal(chosen, x[expected])
    x[expected] = 0.0
    assert torch.equal(out, x)


@given(st.integers(1, 24), st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=50))
@settings(deadline=None)
def test_packed_numbers(width: int, numbers: list[int]) -> None:
    x = torch.tensor([n % 2**width for n in numbers])
    packed = torch.zeros(-(-len(x) * width // 8), dtype=torch.uint8)
    codec.pack_bits(x, width, packed)
    assert torch.equal(packed, eager.pack_bits(x, width))
    assert torch.equal(codec.unpack_bits(packed, len(x), width), x)
    assert torch.equal(eager.unpack_bits(packed, len(x), width), x)


SENT = [
    compressors.TopK(ratio=0.01),
    compressors.TopK(ratio=0.4),
    compressors.TopK(k=3),
    compressors.RandK(ratio=0.1, seed=5),
    compressors.RandK(ratio=0.1, scaled=False),
    compressors.ScaledSign(),
    compressors.NaturalCompression(seed=2),
    compressors.QSGD(levels=4),
    compressors.QSGD(levels=15, scope="block", block_size=64),
    compressors.Identity(),
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("compressor", SENT, ids=repr)
def test_what_is_not_finite_is_told(
    compressor: Compressor, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any place; and what is large is no infinity, though sums of it are."""
    if not native:
        monkeypatch.setattr(codec, "_native", lambda x: None)
    form, n = format_of(compressor), 40_001
    message, out = torch.zeros(form.size(n), dtype=torch.uint8), torch.empty(n)

    def told(g: Tensor, e: Tensor | None = None, *, keep: bool = True) -> bool:
        return form.encode(Source(g, e, 0.5), Draw(0, 1, 2), out, message, keep=keep)

    g, e = values(n, 1), values(n, 2)
    assert told(g)
    assert told(g, e)
    assert told(g, e, keep=False)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, n // 2, n - 1):
            spoiled = g.clone()
            spoiled[place] = bad
            assert not told(spoiled)
            assert not told(spoiled, e, keep=False)
            assert not told(g, spoiled)
    huge = torch.full((n,), 3e38)
    assert not told(huge, huge)  # 4.5e38
    if isinstance(compressor, compressors.TopK | compressors.Identity):
        assert told(huge)


@pytest.mark.parametrize("compressor", SENT, ids=repr)
@pytest.mark.parametrize("d", [1, 100, 5000])
@pytest.mark.parametrize("native", [True, False])
def test_messages(
    compressor: Compressor, d: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(codec, "_native", lambda x: None)
    form = format_of(compressor)
    # The formula of the methods, in whole bytes; places and values of top-k are rounded apart.
    expected = -(-compressor.bits(d) // 8)
    if isinstance(compressor, compressors.TopK):
        k = compressor.chosen_of(d)
        expected = 4 * k + index_bytes(d, k)
        assert 0 <= 8 * expected - compressor.bits(d) < 8
    assert form.size(d) == expected
    draw = Draw(0, 3, 7)
    message = torch.zeros(form.size(d), dtype=torch.uint8)
    g, e = values(d, 1), values(d, 2)
    rest, out = torch.empty(d), torch.empty(d)
    x = Source(g, e, 0.25)
    form.encode(x, draw, rest, message)
    form.decode(message.unsqueeze(0), draw, Target(out))
    value = 1.0 * e + 0.25 * g
    sent = compressor(value, step=3, tensor_id=7)
    if isinstance(compressor, compressors.ScaledSign):  # its scale is a sum, rounded once
        torch.testing.assert_close(out, sent, rtol=1e-6, atol=0)
        assert torch.equal(rest, value - out)
    else:
        assert torch.equal(out, sent)
        assert torch.equal(rest, value - sent)
    # The same message when what is left is not wanted; and a sum that is not all of the outcome.
    again, base = torch.zeros_like(message), values(d, 3)
    form.encode(x, draw, torch.empty(d), again, keep=False)
    assert torch.equal(again, message)
    onto = torch.empty(d)
    form.decode(message.unsqueeze(0), draw, Target(onto, 0.3, base))
    assert torch.equal(onto, base + 0.3 * out)


@pytest.mark.parametrize("n", [1, 9, 65, 513, 32_768, 70_001])
def test_rounded_at_random(n: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and plain torch: the same bytes, rests and sums; a unit is a sum, rounded once."""
    ranks = 2
    forms = [
        compressors.NaturalCompression(seed=2**40 + 3),
        compressors.QSGD(levels=7, scope="block", block_size=100),
        compressors.QSGD(levels=100, seed=9),
        compressors.QSGD(levels=1, scope="block", block_size=40_000),
    ]
    for compressor in forms:
        form = format_of(compressor)
        found = []
        for native in (True, False):
            if not native:
                monkeypatch.setattr(codec, "_native", lambda x: None)
            messages = torch.zeros(ranks, form.size(n), dtype=torch.uint8)
            rests = [torch.empty(n) for _ in range(ranks)]
            for rank in range(ranks):
                x = Source(values(n, rank), values(n, rank + 9), 0.3, -1.0)
                form.encode(x, Draw(rank, 5, 1), rests[rank], messages[rank])
            total = torch.empty(n)
            form.decode(messages, Draw(0, 5, 1), Target(total))
            found.append((messages, *rests, total))
            monkeypatch.undo()
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs), compressor


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads: int) -> None:
    before = torch.get_num_threads()
    n = 100_001
    found = []
    for used in (threads, 2):
        torch.set_num_threads(used)
        rest, out = torch.empty(n), torch.empty(n)
        for compressor in SENT:
            form = format_of(compressor)
            message = torch.zeros(2, form.size(n), dtype=torch.uint8)
            for row in message:
                form.encode(Source(values(n, 4)), Draw(0, 1, 2), rest, row)
            form.decode(message, Draw(0, 1, 2), Target(out))
            found.append((used == 2, message, rest.clone(), out.clone()))
    torch.set_num_threads(before)
    one, other = ([f[1:] for f in found if f[0] is two] for two in (False, True))
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_messages_of_ranks_are_added_in_their_order() -> None:
    form = format_of(pysmooth.TopK(ratio=0.5))
    messages = torch.zeros(3, form.size(1000), dtype=torch.uint8)
    rest, out = torch.empty(1000), torch.empty(1000)
    total = torch.zeros(1000)
    for rank in range(3):
        x = values(1000, rank) * 10.0**rank
        form.encode(Source(x), Draw(rank, 0, 0), rest, messages[rank])
        total += pysmooth.TopK(ratio=0.5)(x)
    form.decode(messages, Draw(0, 0, 0), Target(out))
    assert torch.equal(out, total)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.3, 1.0])
def test_sums_of_the_largest(n: int, ratio: float) -> None:
    form = format_of(pysmooth.TopK(ratio=ratio))
    k = pysmooth.TopK(ratio=ratio).chosen_of(n)
    messages = torch.zeros(3, form.size(n) + 3, dtype=torch.uint8)[:, 3:]  # nothing is aligned
    for rank in range(3):
        form.encode(Source(values(n, rank)), Draw(rank, 0, 0), torch.empty(n), messages[rank])
    out = torch.empty(n)
    form.decode(messages, Draw(0, 0, 0), Target(out))
    assert torch.equal(out, eager.sum_top_k(messages, n, k))


@pytest.mark.parametrize(
    "compressor",
    [
        compressors.HardThreshold(0.1),
        compressors.TopK(ratio=0.1, scope="global"),
        compressors.TopK(ratio=0.1, scope="block"),
        "topk",
    ],
    ids=repr,
)
def test_what_has_no_message_is_refused(compressor: object) -> None:
    with pytest.raises(TypeError, match="compressor"):
        format_of(compressor)  # type: ignore[arg-type]


def test_the_cpu_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch would write the same bytes, and nobody would see why it takes long."""
    n, drawn = 40_001, codec.Drawn(0, 3, 7)
    g, out, bits = values(n, 1), torch.empty(n), torch.zeros(-(-n // 8), dtype=torch.uint8)
    natural, levels = (
        torch.zeros(format_of(compressor).size(n), dtype=torch.uint8)
        for compressor in (compressors.NaturalCompression(), compressors.QSGD(levels=4))
    )
    monkeypatch.setattr(codec, "eager", None)
    monkeypatch.setattr(codec, "permutation", None)
    codec.code_signs(g, None, 1.0, 1.0, out, bits)
    codec.subtract_signs(out, torch.tensor(0.5))
    codec.sum_signs(bits.unsqueeze(0), torch.ones(1), 1.0, out)
    codec.vote(bits.unsqueeze(0), n, torch.empty_like(bits))
    codec.pack_bits(torch.ones(n, dtype=torch.int64), 1, bits)
    assert bool(codec.unpack_bits(bits, n, 1).all())
    message = torch.zeros(4 * 9 + index_bytes(n, 9), dtype=torch.uint8)
    assert codec.code_top_k(Source(g), 9, out, message)
    codec.sum_top_k(message.unsqueeze(0), 9, Target(out))
    codec.code_natural(Source(g), drawn, out, natural)
    codec.sum_natural(natural.unsqueeze(0), Target(out))
    codec.code_levels(Source(g), drawn, 4, n, out, levels)
    codec.sum_levels(levels.unsqueeze(0), 4, n, Target(out))
    assert len(codec.places(9, out, drawn)) == 9
