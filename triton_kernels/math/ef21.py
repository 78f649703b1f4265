"""EF21 on one worker. Twin of csrc/core/math/ef21.h."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ..codec import codec, codec_sum
from ..rule import GRAD, NOTHING, PARAM, SQUARES, STAGE, STATE, Rule, Streams


@triton.jit
def prepare(h, x):
    """1 - eta, eta, shrink, lr or lr / norm, codec, level, scale."""
    lr, eta, weight_decay, normalize, kind, level, _, _ = h
    norm = x[STAGE + 1]
    step = tl.where(norm == 0, 0.0, lr / norm)
    step = tl.where(normalize == 0, lr, step)
    return 1.0 - eta, eta, 1.0 - lr * weight_decay, step, kind, level, x[STAGE]


@triton.jit
def estimate(distance, s, h):
    """h + C(w - h)."""
    return s[0] + codec(distance, h[4], h[5], h[6])


@triton.jit
def source(p, g, s, h):
    """w - h, w being the gradient."""
    return g - s[0], p, s


@triton.jit
def source_m(p, g, s, h):
    """The same for v = (1 - eta) * v + eta * g."""
    v = s[1] * h[0] + g * h[1]
    return v - s[0], p, (s[0], v)


@triton.jit
def source_2m(p, g, s, h):
    """The same for u = (1 - eta) * u + eta * v."""
    v = s[1] * h[0] + g * h[1]
    u = s[2] * h[0] + v * h[1]
    return u - s[0], p, (s[0], v, u)


@triton.jit
def change(p, g, s, h):
    """h = h + C(g - h), of which the norm is taken."""
    moved = estimate(g - s[0], s, h)
    return moved, p, (moved,)


@triton.jit
def change_m(p, g, s, h):
    """The same towards v."""
    moved = estimate(s[1] - s[0], s, h)
    return moved, p, (moved, s[1])


@triton.jit
def change_2m(p, g, s, h):
    """The same towards u."""
    moved = estimate(s[2] - s[0], s, h)
    return moved, p, (moved, s[1], s[2])


@triton.jit
def update(p, g, s, h):
    """p = (1 - lr * weight_decay) * p - lr * h, or lr * h / ||h||."""
    return p * h[2] - s[0] * h[3], s


def sums(h: Sequence[float]) -> tuple[int, ...]:
    """The codec's scale; the norm, where steps are normalised."""
    return codec_sum(h[4]), SQUARES if h[3] != 0 else NOTHING


HYPER = ("lr", "eta", "weight_decay", "normalize", "codec", "level", "seed_low", "seed_high")

RULES = tuple(
    Rule(
        name,
        HYPER,
        1 + momenta,
        prepare,
        update,
        7,
        counts_steps=True,
        sources=sources,
        passes=(
            Streams(GRAD | 7 * STATE, 6 * STATE),
            Streams((GRAD if momenta == 0 else STATE << momenta) | STATE, STATE),
        ),
        applies=Streams(PARAM | STATE, PARAM),
        sums=sums,
    )
    for momenta, (name, sources) in enumerate(
        (
            ("ef21_dense", (source, change)),
            ("ef21_dense_m", (source_m, change_m)),
            ("ef21_dense_2m", (source_2m, change_2m)),
        )
    )
)
