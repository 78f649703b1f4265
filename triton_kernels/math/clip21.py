"""Clip21 on one worker. Twin of csrc/core/math/clip21.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rule import GRAD, PARAM, SQUARES, STAGE, STATE, Rule, Streams


@triton.jit
def prepare(h, x):
    """1 - beta, beta, min(1, tau / norm), beta_hat, shrink, lr."""
    lr, tau, beta, beta_hat, weight_decay, _, _, _ = h
    norm = x[STAGE]
    coef = tl.where(norm > tau, tau / norm, tl.where(norm == norm, 1.0, norm))
    return 1.0 - beta, beta, coef, beta_hat, 1.0 - lr * weight_decay, lr


@triton.jit
def moved(p, estimate, distance, h):
    """The new parameter and estimate."""
    estimate = estimate + distance * h[2] * h[3]
    return p * h[4] - estimate * h[5], estimate


@triton.jit
def source(p, g, s, h):
    """The distance of the gradient from the estimate."""
    return g - s[0], p, s


@triton.jit
def update(p, g, s, h):
    """h += clip(g - h); p -= lr * h."""
    p, estimate = moved(p, s[0], g - s[0], h)
    return p, (estimate,)


@triton.jit
def source_momentum(p, g, s, h):
    """v = (1 - beta) * v + beta * g, and its distance."""
    v = s[1] * h[0] + g * h[1]
    return v - s[0], p, (s[0], v)


@triton.jit
def update_momentum(p, g, s, h):
    """h += beta_hat * clip(v - h); p -= lr * h."""
    p, estimate = moved(p, s[0], s[1] - s[0], h)
    return p, (estimate, s[1])


HYPER = (
    *("lr", "tau", "beta", "beta_hat", "weight_decay"),
    *("noise_std", "seed_low", "seed_high"),
)

RULES = (
    Rule(
        "clip21",
        HYPER,
        1,
        prepare,
        update,
        6,
        sources=(source,),
        passes=(Streams(GRAD | STATE, 0),),
        applies=Streams(PARAM | GRAD | STATE, PARAM | STATE),
        sums=lambda _: (SQUARES,),
    ),
    Rule(
        "clip21_sgd2m",
        HYPER,
        2,
        prepare,
        update_momentum,
        6,
        sources=(source_momentum,),
        passes=(Streams(GRAD | 3 * STATE, 2 * STATE),),
        applies=Streams(PARAM | 3 * STATE, PARAM | STATE),
        sums=lambda _: (SQUARES,),
    ),
)
