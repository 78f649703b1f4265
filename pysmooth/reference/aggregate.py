"""aggregate, in eager torch: sums over the vectors of many clients, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK, _LANES = 8192, 32


def tree_sum(x: Tensor) -> Tensor:
    """The sum over the first dimension: neighbours are added up, until one is left.

    What has no neighbour waits. The order of additions is that of the definition on every machine,
    torch.sum's is not.
    """
    while (n := len(x)) > 1:
        pairs = x[0 : n - n % 2 : 2] + x[1::2]
        x = pairs if n % 2 == 0 else torch.cat([pairs, x[-1:]])
    return x[0] if len(x) else x.sum(0)


def weighted_sum(vectors: Tensor, weights: Tensor) -> Tensor:
    """The sum of weights[c] * vectors[c], a vector in float64.

    Args:
        vectors: (clients, elements).
        weights: (clients,), in float64.
    """
    # Products and sums are rounded each: one instruction for both would depend on the CPU.
    return tree_sum(vectors.double() * weights.unsqueeze(1))


def add_dots(vectors: Tensor, other: Tensor, out: Tensor) -> None:
    """Adds the inner products of vectors (clients, elements) with another one to out (clients,).

    Terms are added up within blocks: every 32nd to the same lane, lanes as halves of them. Blocks
    follow one another.
    """
    for begin in range(0, vectors.shape[1], _BLOCK):
        terms = vectors[:, begin : begin + _BLOCK].double() * other[begin : begin + _BLOCK].double()
        rows = torch.nn.functional.pad(terms, (0, -terms.shape[1] % _LANES))
        lanes = torch.zeros(len(vectors), _LANES, dtype=torch.float64, device=vectors.device)
        for row in rows.view(len(vectors), -1, _LANES).unbind(1):
            lanes = lanes + row
        while (half := lanes.shape[1] // 2) > 0:
            lanes = lanes[:, :half] + lanes[:, half:]
        out += lanes[:, 0]
