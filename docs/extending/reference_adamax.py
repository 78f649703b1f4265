"""Adamax as torch.optim has it. Twin of csrc/core/math/adamax.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
) -> Tensor:
    """Returns the new parameter; updates the moment and the norm in place."""
    if weight_decay:
        g = g + weight_decay * p
    m, u = states
    m.copy_(beta1 * m + (1 - beta1) * g)
    u.copy_(torch.maximum(beta2 * u, g.abs() + eps))
    new: Tensor = p - lr / (1 - beta1**step) * m / u
    return new
