"""A net of one hidden layer, many of them at once, and clients who have two digits of ten each."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .digits import digits

PIXELS, HIDDEN, KINDS = 16, 16, 10
SHAPES = ((PIXELS, HIDDEN), (1, HIDDEN), (HIDDEN, KINDS), (1, KINDS))
SIZE = sum(a * b for a, b in SHAPES)


def started(seed: int) -> Tensor:
    """Weights (SIZE,) to begin with: Gaussian over the root of their inputs; biases 0."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(a * b, generator=generator) / math.sqrt(a) if a > 1 else torch.zeros(b)
        for a, b in SHAPES
    ]
    return torch.cat(parts)


def logits(weights: Tensor, images: Tensor) -> Tensor:
    """(..., m, 10) of nets (..., SIZE) and images (..., m, PIXELS)."""
    parts = torch.split_with_sizes(weights, [a * b for a, b in SHAPES], -1)
    shaped = [p.reshape(*p.shape[:-1], *s) for p, s in zip(parts, SHAPES, strict=True)]
    hidden = torch.tanh(torch.matmul(images, shaped[0]) + shaped[1])
    return torch.matmul(hidden, shaped[2]) + shaped[3]


def _shrunk(images: Tensor) -> Tensor:
    """(m, 16) of images (m, 8, 8): means of four pixels."""
    return F.avg_pool2d(images.unsqueeze(1), 2).flatten(1)


class Clients:
    """n clients with as many images each: client i has the digits 2 (i mod 5) and the next.

    Args:
        clients: n, a multiple of 5.
        batch: images of a gradient.
    """

    def __init__(self, clients: int, batch: int) -> None:
        data, parts = digits(), clients // 5
        images, labels = _shrunk(data.train[0]), data.train[1]
        own = []
        for pair in range(5):
            mine = ((labels == 2 * pair) | (labels == 2 * pair + 1)).nonzero()[:, 0]
            own.append(mine[: len(mine) // parts * parts].view(parts, -1))
        m = min(part.shape[1] for part in own)
        rows = torch.stack([part[:, :m] for part in own], dim=1).flatten(0, 1)  # client by client
        self.images, self.labels, self.batch = images[rows], labels[rows], batch
        self.test = (_shrunk(data.test[0]), data.test[1])

    def gradients(self, weights: Tensor, generator: torch.Generator, seeds: int) -> Tensor:
        """(n, S, SIZE) at nets (S, SIZE), on batches that rows a multiple of `seeds` apart share.

        Rows are step sizes by seeds, seeds fastest.
        """
        n, m = self.labels.shape
        drawn = torch.rand(n, seeds, m, generator=generator).topk(self.batch).indices
        chosen = drawn.repeat(1, len(weights) // seeds, 1)  # (n, S, batch)
        who = torch.arange(n).view(n, 1, 1)
        images, labels = self.images[who, chosen], self.labels[who, chosen]
        nets = weights.expand(n, *weights.shape).clone().requires_grad_()
        with torch.enable_grad():
            out = logits(nets, images)
            losses = F.cross_entropy(out.flatten(0, 2), labels.flatten(), reduction="sum")
            (grads,) = torch.autograd.grad(losses / self.batch, nets)
        return grads

    def accuracy(self, weights: Tensor) -> Tensor:
        """(S,): the part of the 400 test images that nets (S, SIZE) read."""
        return (logits(weights, self.test[0]).argmax(-1) == self.test[1]).double().mean(-1)
