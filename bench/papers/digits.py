"""A small transformer that reads digits, and what it is trained with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import pysmooth

from .registry import need


class Digits(NamedTuple):
    """Images (n, 8, 8) of numbers around 0 and their labels, apart for training and for tests."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(*, turned: bool = False) -> Digits:
    """The 1,797 handwritten digits of scikit-learn; `turned` by 90 degrees and with light inverted.

    The order is drawn from a fixed seed; the last 400 are for tests.
    """
    raw = need("sklearn.datasets").load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32) / 8 - 1
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    if turned:
        x = -x.rot90(1, (1, 2))
    return Digits((x[:-400].contiguous(), y[:-400]), (x[-400:].contiguous(), y[-400:]))


class Block(nn.Module):
    """Attention and a feed-forward net, both of plain linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width), as it came."""
        h = self.before(x)
        parts = (part(h) for part in (self.query, self.key, self.value))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        out: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return out


class DigitReader(nn.Module):
    """A row of an image is a token."""

    TARGETS = ("query", "key", "value", "out", "up", "down")

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width) * 0.1)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Of images (n, 8, 8), logits (n, 10)."""
        h = self.blocks(self.embed(x) + self.place)
        out: Tensor = self.head(h.mean(1))
        return out


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(
    data: tuple[Tensor, Tensor], size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches, drawn without replacement each."""
    for _ in range(steps):
        chosen = torch.randperm(len(data[0]), generator=generator)[:size]
        yield data[0][chosen], data[1][chosen]


def pretrained(steps: int) -> DigitReader:
    """One that has learned to read digits as they are."""
    torch.manual_seed(0)
    model = DigitReader()
    optimizer = pysmooth.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for batch in batches(digits().train, 64, steps, torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model
