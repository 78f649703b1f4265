"""Stochastic gradient descent as torch.optim.SGD has it. Twin of csrc/core/math/sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

HYPER = (
    "lr",
    "momentum",
    "dampening",
    "nesterov",
    "weight_decay",
    "decoupled_weight_decay",
)


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: float,
    weight_decay: float,
    decoupled_weight_decay: float,
    first: bool,
) -> Tensor:
    """Returns the new parameter, computed in the dtype of `p`; updates the momentum in place.

    `g` is already clipped.
    """
    if weight_decay and not decoupled_weight_decay:
        g = g + weight_decay * p
    if states:
        (m,) = states
        m.copy_(g if first else momentum * m + (1 - dampening) * g)
        g = g + momentum * m if nesterov else m
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    return p - lr * g
