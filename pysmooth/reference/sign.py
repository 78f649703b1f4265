"""Steps along signs: SignSGD, Signum, Lion. Twin of csrc/core/math/sign.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .staged import Member, Passes

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


def scaled_step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; updates the momenta in place."""
    directions = []
    for m in members:
        d = m.g
        for buffer in m.states:
            beta = m.hyper["momentum"]
            d = buffer.copy_(beta * buffer + (1 - beta) * d)
        directions.append(d)
    out = []
    means = passes.means(0, members, directions)
    for m, d, mean in zip(members, directions, means, strict=True):
        step = (m.hyper["lr"] * mean).to(d.dtype)
        out.append(m.p * (1 - m.hyper["lr"] * m.hyper["weight_decay"]) - step * sign(d))
    return out


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
