"""torch.optim.Adagrad's update of a clipped gradient. Twin of csrc/core/math/adagrad.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops import divide, root
from ..rule import STEP, Rule


@triton.jit
def prepare(h, x):
    """lr, eps, decay, decays."""
    lr, lr_decay, eps, weight_decay = h
    return (
        lr / (1.0 + (x[STEP] - 1.0) * lr_decay),
        eps,
        weight_decay,
        tl.where(weight_decay != 0, 1.0, 0.0),
    )


@triton.jit
def update(p, g, s, h):
    """Sum += g^2; p -= lr * g / (sqrt(sum) + eps)."""
    lr, eps, decay, decays = h
    g = tl.where(decays != 0, g + p * decay, g)
    total = s[0] + g * g
    return p - divide(g * lr, root(total) + eps), (total,)


HYPER = ("lr", "lr_decay", "eps", "weight_decay")

RULES = (Rule("adagrad", HYPER, 1, prepare, update, 4, counts_steps=True, low_states=1),)
