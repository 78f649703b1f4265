"""Adam and AdamW as torch.optim has them. Twin of csrc/core/math/adam.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay")


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
    decoupled_weight_decay: float,
    step: float,
) -> Tensor:
    """Returns the new parameter; updates the moments, and amsgrad's third state, in place."""
    if weight_decay and not decoupled_weight_decay:
        g = g + weight_decay * p
    m, v, *rest = states
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * (g * g))
    for top in rest:
        torch.maximum(top, v, out=top)
        v = top
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    new: Tensor = p - lr / (1 - beta1**step) * m / denominator
    return new
