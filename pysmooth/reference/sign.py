"""Steps along signs: SignSGD, Signum, Lion. Twin of csrc/core/math/sign.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HYPER = ("lr", "momentum", "weight_decay")
LION_HYPER = ("lr", "beta1", "beta2", "weight_decay")


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1. Zeros keep their sign, NaN passes through (torch.sign makes it 0)."""
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return torch.where(x > 0, one, torch.where(x < 0, -one, x))


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """Returns the new parameter; updates the momentum, where there is one, in place."""
    for m in states:
        g = m.copy_(momentum * m + (1 - momentum) * g)
    return p * (1 - lr * weight_decay) - lr * sign(g)


def lion(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> Tensor:
    """Returns the new parameter; updates the momentum in place, after its sign was taken."""
    (m,) = states
    direction = sign(beta1 * m + (1 - beta1) * g)
    m.copy_(beta2 * m + (1 - beta2) * g)
    return p * (1 - lr * weight_decay) - lr * direction
