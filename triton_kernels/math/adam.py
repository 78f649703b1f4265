"""Adam and AdamW on a clipped gradient. Twin of csrc/core/math/adam.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops import divide, power, root
from ..rule import STEP, Rule


@triton.jit
def prepare(h, x):
    """beta1, 1 - beta1, beta2, 1 - beta2, eps, decay, shrink, lr, root, decays."""
    lr, beta1, beta2, eps, weight_decay, decoupled = h
    return (
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        weight_decay,
        tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        lr / (1.0 - power(beta1, x[STEP])),
        1.0 / tl.sqrt(1.0 - power(beta2, x[STEP])),
        tl.where((weight_decay != 0) & (decoupled == 0), 1.0, 0.0),
    )


@triton.jit
def moments(p, g, s, h):
    """The new moments."""
    beta1, admit1, beta2, admit2, _, decay, _, _, _, decays = h
    g = tl.where(decays != 0, g + p * decay, g)
    return s[0] * beta1 + g * admit1, s[1] * beta2 + g * g * admit2


@triton.jit
def moved(p, m, v, h):
    """The new parameter."""
    _, _, _, _, eps, _, shrink, lr, scale, _ = h
    return p * shrink - divide(m * lr, root(v) * scale + eps)


@triton.jit
def update(p, g, s, h):
    """P -= lr * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)."""
    m, v = moments(p, g, s, h)
    return moved(p, m, v, h), (m, v)


@triton.jit
def update_amsgrad(p, g, s, h):
    """The same with the largest v so far. NaN wins, as in torch.maximum."""
    m, v = moments(p, g, s, h)
    top = tl.where(s[2] > v, s[2], tl.where(s[2] != s[2], s[2], v))
    return moved(p, m, top, h), (m, v, top)


HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay")

RULES = (
    Rule("adam", HYPER, 2, prepare, update, 10, counts_steps=True, low_states=3),
    Rule("adam_amsgrad", HYPER, 3, prepare, update_amsgrad, 10, counts_steps=True, low_states=3),
)
