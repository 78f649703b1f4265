"""Norm and coordinate-wise accumulators. Twin of csrc/core/math/accumulator.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NORM_HYPER = ("lr", "beta1", "keep", "admit", "delayed", "weight_decay")
HYPER = ("lr", "beta1", "keep", "admit", "delayed", "eps", "weight_decay")


def accumulate(norm_sq: Tensor, sum_squares: Tensor, *, keep: float, admit: float) -> Tensor:
    """The accumulated squared norm after a step.

    Args:
        norm_sq: before it.
        sum_squares: the squared norm of the step's clipped gradients.
        keep: what the first is multiplied by.
        admit: what the second is multiplied by.
    """
    return keep * norm_sq + admit * sum_squares


def norm_update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    keep: float,
    admit: float,
    delayed: float,
    weight_decay: float,
    norm_sq: tuple[Tensor, Tensor],
) -> Tensor:
    """Returns the new parameter. `norm_sq` is the squared accumulator before and after the step."""
    for m in states:
        m.copy_(beta1 * m + (1 - beta1) * g)
        g = m
    square = norm_sq[0 if delayed else 1]
    step = torch.where(square == 0, 0.0, lr / square.sqrt()).to(p.dtype)
    return p * (1 - lr * weight_decay) - step * g


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    keep: float,
    admit: float,
    delayed: float,
    eps: float,
    weight_decay: float,
) -> Tensor:
    """Returns the new parameter; updates the accumulator, and the momentum if there is one."""
    square, *momentum = states
    before = square.clone()
    square.copy_(keep * square + admit * g * g)
    for m in momentum:
        m.copy_(beta1 * m + (1 - beta1) * g)
        g = m
    root = (before if delayed else square).sqrt()
    return p * (1 - lr * weight_decay) - lr * g / (root + eps)
