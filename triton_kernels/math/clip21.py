"""Clip21 on one worker. Twin of csrc/core/math/clip21.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..draw import NORMAL
from ..rule import GRAD, PARAM, SQUARES, STAGE, STATE, Rule, Streams


@triton.jit
def prepare(h, x):
    """1 - beta, beta, min(1, tau / norm), beta_hat, shrink, lr, noise_std."""
    lr, tau, beta, beta_hat, weight_decay, noise, _, _ = h
    norm = x[STAGE]
    coef = tl.where(norm > tau, tau / norm, tl.where(norm == norm, 1.0, norm))
    return 1.0 - beta, beta, coef, beta_hat, 1.0 - lr * weight_decay, lr, noise


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


@triton.jit
def update_noise(p, g, s, h, drawn):
    """Along the server's estimate, which receives noise."""
    u = (g - s[0]) * h[2]
    server = s[1] + (drawn * h[6] + u) * h[3]
    return p * h[4] - server * h[5], (s[0] + u * h[3], server)


@triton.jit
def update_momentum_noise(p, g, s, h, drawn):
    """The same with momentum."""
    u = (s[1] - s[0]) * h[2]
    server = s[2] + (drawn * h[6] + u) * h[3]
    return p * h[4] - server * h[5], (s[0] + u * h[3], s[1], server)


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
        7,
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
        7,
        sources=(source_momentum,),
        passes=(Streams(GRAD | 3 * STATE, 2 * STATE),),
        applies=Streams(PARAM | 3 * STATE, PARAM | STATE),
        sums=lambda _: (SQUARES,),
    ),
    Rule(
        "clip21_noise",
        HYPER,
        2,
        prepare,
        update_noise,
        7,
        counts_steps=True,
        sources=(source,),
        passes=(Streams(GRAD | STATE, 0),),
        applies=Streams(PARAM | GRAD | 3 * STATE, PARAM | 3 * STATE, draws=True),
        sums=lambda _: (SQUARES,),
        draws=lambda _: NORMAL.value,
    ),
    Rule(
        "clip21_sgd2m_noise",
        HYPER,
        3,
        prepare,
        update_momentum_noise,
        7,
        counts_steps=True,
        sources=(source_momentum,),
        passes=(Streams(GRAD | 3 * STATE, 2 * STATE),),
        applies=Streams(PARAM | 7 * STATE, PARAM | 5 * STATE, draws=True),
        sums=lambda _: (SQUARES,),
        draws=lambda _: NORMAL.value,
    ),
)
