"""AdaGrad and Adam as the theory has them. Twin of csrc/core/math/accumulator.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops import divide, root
from ..rule import NORM_AFTER, NORM_BEFORE, Rule


@triton.jit
def accumulate(h, norm_sq, sum_squares):
    """The accumulated squared norm after a step."""
    return h[2] * norm_sq + h[3] * sum_squares


@triton.jit
def prepare_norm(h, x):
    """beta1, 1 - beta1, shrink, lr / b."""
    lr, beta1, _, _, delayed, weight_decay = h
    norm_sq = tl.where(delayed != 0, x[NORM_BEFORE], x[NORM_AFTER])
    step = tl.where(norm_sq == 0, 0.0, lr / tl.sqrt(norm_sq))
    return beta1, 1.0 - beta1, 1.0 - lr * weight_decay, step


@triton.jit
def update_norm(p, g, s, h):
    """P = (1 - lr * weight_decay) * p - lr * g / b."""
    _, _, shrink, step = h
    return p * shrink - g * step, s


@triton.jit
def update_norm_momentum(p, g, s, h):
    """The same along m = beta1 * m + (1 - beta1) * g."""
    beta1, admit, shrink, step = h
    m = s[0] * beta1 + g * admit
    return p * shrink - m * step, (m,)


@triton.jit
def prepare(h, x):
    """lr, beta1, 1 - beta1, keep, admit, eps, shrink, delayed."""
    lr, beta1, keep, admit, delayed, eps, weight_decay = h
    return lr, beta1, 1.0 - beta1, keep, admit, eps, 1.0 - lr * weight_decay, delayed


@triton.jit
def moved(p, m, before, after, h):
    """The new parameter."""
    lr, _, _, _, _, eps, shrink, delayed = h
    return p * shrink - divide(m * lr, root(tl.where(delayed != 0, before, after)) + eps)


@triton.jit
def update(p, g, s, h):
    """b2 = keep * b2 + admit * g^2, coordinate by coordinate; along g."""
    after = s[0] * h[3] + g * g * h[4]
    return moved(p, g, s[0], after, h), (after,)


@triton.jit
def update_momentum(p, g, s, h):
    """The same along m = beta1 * m + (1 - beta1) * g."""
    after = s[0] * h[3] + g * g * h[4]
    m = s[1] * h[1] + g * h[2]
    return moved(p, m, s[0], after, h), (after, m)


NORM_HYPER = ("lr", "beta1", "keep", "admit", "delayed", "weight_decay")
HYPER = ("lr", "beta1", "keep", "admit", "delayed", "eps", "weight_decay")

RULES = (
    Rule("norm_accumulator", NORM_HYPER, 0, prepare_norm, update_norm, 4, accumulate=accumulate),
    Rule(
        "norm_accumulator_momentum",
        NORM_HYPER,
        1,
        prepare_norm,
        update_norm_momentum,
        4,
        accumulate=accumulate,
    ),
    Rule("accumulator", HYPER, 1, prepare, update, 8),
    Rule("accumulator_momentum", HYPER, 2, prepare, update_momentum, 8),
)
