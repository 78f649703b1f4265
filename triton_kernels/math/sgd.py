"""torch.optim.SGD's update of a clipped gradient. Twin of csrc/core/math/sgd.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rule import FIRST, Rule


@triton.jit
def prepare(h, x):
    """decay, keep, admit, momentum, shrink, lr, decays, nesterov."""
    lr, momentum, dampening, nesterov, weight_decay, decoupled = h
    first = x[FIRST] != 0
    return (
        weight_decay,
        tl.where(first, 0.0, momentum),
        tl.where(first, 1.0, 1.0 - dampening),
        momentum,
        tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        lr,
        tl.where((weight_decay != 0) & (decoupled == 0), 1.0, 0.0),
        nesterov,
    )


@triton.jit
def update(p, g, s, h):
    """P = (1 - lr * weight_decay) * p - lr * g."""
    decay, _, _, _, shrink, lr, decays, _ = h
    g = tl.where(decays != 0, g + p * decay, g)
    return p * shrink - g * lr, s


@triton.jit
def update_momentum(p, g, s, h):
    """M = momentum * m + (1 - dampening) * g, then along m, or g + momentum * m."""
    decay, keep, admit, momentum, shrink, lr, decays, nesterov = h
    g = tl.where(decays != 0, g + p * decay, g)
    m = s[0] * keep + g * admit
    g = tl.where(nesterov != 0, g + m * momentum, m)
    return p * shrink - g * lr, (m,)


HYPER = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled_weight_decay")

RULES = (
    Rule("sgd", HYPER, 0, prepare, update, 8),
    Rule("sgd_momentum", HYPER, 1, prepare, update_momentum, 8),
)
