"""Stochastic gradient descent as torch.optim.SGD has it. Twin of csrc/core/math/sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

HYPER = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "decoupled_weight_decay",
    "nesterov",
    "maximize",
    "clip_value",
)


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    decoupled_weight_decay: float,
    nesterov: float,
    maximize: float,
    clip_value: float,
    first: bool,
) -> Tensor:
    """Returns the new parameter, computed in the dtype of `p`; updates the momentum in place.

    `g` already carries the clip coefficient. A negative or NaN `clip_value` means no clamp.
    """
    if maximize:
        g = -g
    if clip_value >= 0:
        g = g.clamp(-clip_value, clip_value)
    if weight_decay and not decoupled_weight_decay:
        g = g + weight_decay * p
    if states:
        (m,) = states
        m.copy_(g if first else momentum * m + (1 - dampening) * g)
        g = g + momentum * m if nesterov else m
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    return p - lr * g
