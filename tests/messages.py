"""What messages of some ranks are, and what they are decoded to, by the kernels at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from pysmooth import compressors
from pysmooth.compressors import Compressor
from pysmooth.distributed.wire import Draw, Source, Target, format_of

# Of all messages with kernels on devices, in the forms that take other ways through them.
SENT = [
    compressors.TopK(ratio=0.01),
    compressors.TopK(ratio=0.4),
    compressors.TopK(ratio=1.0),
    compressors.TopK(k=1),
    compressors.RandK(ratio=0.1, seed=2**63 + 5),
    compressors.RandK(k=3, scaled=False),
    compressors.NaturalCompression(seed=2**40 + 3),
    compressors.QSGD(levels=1),
    compressors.QSGD(levels=7, scope="block", block_size=100, seed=2**64 - 1),
    compressors.QSGD(levels=2**20, scope="block", block_size=64),
]
KINDS = ("normal", "ties", "zeros", "one", "tiny", "huge")


def values(n: int, seed: int = 0, kind: str = "normal") -> Tensor:
    """Some n numbers, with zeros of both signs among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    x[torch.rand(n, generator=g) < 0.1] = 0.0
    x[torch.rand(n, generator=g) < 0.05] = -0.0
    if kind == "ties":
        return x.sign()
    if kind == "zeros":
        return torch.zeros(n)
    if kind == "one":
        return torch.where(torch.arange(n) == n // 2, -3.0, 0.0)
    return x * {"normal": 1.0, "tiny": 1e-41, "huge": 1e37}[kind]


class Fenced:
    """Memory for n numbers each, at addresses that are aligned or not, between numbers to keep."""

    def __init__(self) -> None:
        self._rooms: list[tuple[Tensor, int, int]] = []

    def __call__(self, n: int) -> Tensor:
        before = 4 + len(self._rooms) % 4
        room = torch.full((before + n + 4,), 7.0)
        self._rooms.append((room, before, n))
        return room[before : before + n]

    def check(self) -> None:
        """Nothing around them was written."""
        for room, before, n in self._rooms:
            assert bool((room[:before] == 7.0).all())
            assert bool((room[before + n :] == 7.0).all())


def coded(
    compressor: Compressor, n: int, kind: str = "normal", *, feedback: bool = True, ranks: int = 3
) -> list[Tensor]:
    """Messages, what is left on every rank, and the sum, alone and on top of something.

    Messages lie as in a bucket: behind other bytes, at odd addresses.
    """
    form = format_of(compressor)
    whole = torch.full((ranks, 5 + form.size(n) + 2), 9, dtype=torch.uint8)
    messages = whole[:, 5:-2]
    fenced = Fenced()
    rests = [fenced(n) for _ in range(ranks)]
    told = []
    for rank, rest in enumerate(rests):
        e = values(n, rank + 9, kind) if feedback else None
        x = Source(values(n, rank, kind), e, 0.3, -1.0 if feedback else 1.0)
        draw = Draw(rank, 2**31 + 5, rank)
        told.append(form.encode(x, draw, rest, messages[rank]))
        again = torch.full((5 + form.size(n),), 7, dtype=torch.uint8)
        form.encode(x, draw, fenced(n), again[5:], keep=False)
        assert torch.equal(again[5:], messages[rank])
    total, onto = fenced(n), fenced(n)
    form.decode(messages, Draw(0, 2**31 + 5, 1), Target(total))
    form.decode(messages[1:], Draw(0, 2**31 + 5, 1), Target(onto, 0.3, values(n, 5)), first=1)
    fenced.check()
    return [whole, *rests, total, onto, torch.tensor(told)]


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Zeros of different signs are different."""
    if ours.dtype == torch.float32:
        return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    return torch.equal(ours, theirs)
