"""What Byzantine clients send instead of their gradients: for tests of robustness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bit_flip(own: Tensor) -> Tensor:
    """-g: the honest gradient, turned round."""
    return -own


def inner_product_manipulation(honest: Sequence[Tensor], factor: float = 0.1) -> Tensor:
    """IPM: -factor * mean(g) of the honest clients.

    Source: arXiv:1903.03936.
    """
    return torch.stack(list(honest)).mean(0).mul_(-factor)


def a_little_is_enough(honest: Sequence[Tensor], deviations: float) -> Tensor:
    """ALIE: mean(g) - deviations * std(g) of the honest clients, by coordinate.

    Source: arXiv:1902.06156.
    """
    stacked = torch.stack(list(honest))
    return stacked.mean(0) - deviations * stacked.std(0, unbiased=False)
