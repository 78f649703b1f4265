"""AdaGrad as torch.optim.Adagrad has it. Twin of csrc/core/math/adagrad.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

HYPER = ("lr", "lr_decay", "eps", "weight_decay")


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    step: float,
) -> Tensor:
    """Returns the new parameter; adds the squared gradient to the sum in place."""
    if weight_decay:
        g = g + weight_decay * p
    (total,) = states
    total.addcmul_(g, g)
    return p - lr / (1 + (step - 1) * lr_decay) * g / (total.sqrt() + eps)
