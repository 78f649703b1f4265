"""SGD with error feedback. Twin of csrc/core/math/ef_sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ..compress import compress, compress_draw, compress_sum, scaled_sign, scales
from ..rule import (
    ABS,
    EVERYTHING,
    LAST_SCALE,
    NOTHING,
    PARAM,
    STAGE,
    STATE,
    WIDE,
    Rule,
    Streams,
)


@triton.jit
def prepare(h, x):
    """lr, momentum, decay, compressor, level, its scales."""
    lr, momentum, weight_decay, kind, level, _, _ = h
    scale, inverse = scales(kind, level, x[STAGE], x[WIDE])
    return lr, momentum, weight_decay, kind, level, scale, inverse


@triton.jit
def descent(p, g, h):
    """The gradient with weight decay."""
    return tl.where(h[2] != 0, g + p * h[2], g)


@triton.jit
def source(p, g, s, h):
    """e + lr * g, which stays where e was."""
    v = s[0] + descent(p, g, h) * h[0]
    return v, p, (v,)


@triton.jit
def source_momentum(p, g, s, h):
    """The same along m = momentum * m + g."""
    m = s[1] * h[1] + descent(p, g, h)
    v = s[0] + m * h[0]
    return v, p, (v, m)


@triton.jit
def sent(v, h, drawn):
    """What is sent of v: nothing where lr is 0."""
    return tl.where(h[0] == 0, 0.0, compress(v, h[3], h[4], h[5], h[6], drawn))


@triton.jit
def update(p, g, s, h, drawn=None):
    """p -= C(v); e = v - C(v)."""
    c = sent(s[0], h, drawn)
    return p - c, (s[0] - c,)


@triton.jit
def update_momentum(p, g, s, h, drawn=None):
    """The same; m stays."""
    c = sent(s[0], h, drawn)
    return p - c, (s[0] - c, s[1])


@triton.jit
def again(g, s):
    """v, where e was."""
    return s[0]


@triton.jit
def taken(p, s, c, h):
    """Of a chosen coordinate everything is sent."""
    return p - c, (s[0] - c,) + s[1:]


# ---- with the scaled sign: what went into it is kept, and its scale ------------------------------


@triton.jit
def prepare_sign(h, x):
    """lr, momentum, decay, the last scale, scale."""
    lr, momentum, weight_decay = h
    return lr, momentum, weight_decay, x[LAST_SCALE], x[STAGE]


@triton.jit
def source_sign(p, g, s, h):
    """v - C(v) of the last step, + lr * g."""
    v = s[0] - scaled_sign(s[0], h[3]) + descent(p, g, h) * h[0]
    return v, p, (v,)


@triton.jit
def source_sign_momentum(p, g, s, h):
    """The same along m."""
    m = s[1] * h[1] + descent(p, g, h)
    v = s[0] - scaled_sign(s[0], h[3]) + m * h[0]
    return v, p, (v, m)


@triton.jit
def update_sign(p, g, s, h):
    """p -= C(v)."""
    return tl.where(h[0] == 0, p, p - scaled_sign(s[0], h[4])), s


HYPER = ("lr", "momentum", "weight_decay", "compressor", "level", "seed_low", "seed_high")
SIGN_HYPER = ("lr", "momentum", "weight_decay")


def sums(h: Sequence[float]) -> tuple[int, ...]:
    """What the compressor needs; nothing where nothing is sent."""
    return (NOTHING if h[0] == 0 else compress_sum(h[3]),)


def sign_sums(h: Sequence[float]) -> tuple[int, ...]:
    """The scale; nothing where nothing is sent."""
    return (NOTHING if h[0] == 0 else ABS,)


PASSES = (Streams(EVERYTHING, 3 * STATE),)

RULES = (
    *(
        Rule(
            name,
            HYPER,
            states,
            prepare,
            update_,
            7,
            counts_steps=True,
            low_states=1,
            sources=(source_,),
            passes=PASSES,
            applies=Streams(PARAM | STATE, PARAM | STATE, draws=True),
            sums=sums,
            reads_param=lambda h: h[2] != 0,
            keeps_value=True,
            again=(again,),
            looks=(Streams(STATE, 0),),
            scales=(5,),
            draws=lambda h: compress_draw(h[3:]),
            absorbs=states == 1,
        )
        for name, states, source_, update_ in (
            ("ef_sgd_dense", 1, source, update),
            ("ef_sgd_dense_momentum", 2, source_momentum, update_momentum),
        )
    ),
    *(
        Rule(
            name,
            HYPER,
            states,
            prepare,
            None,
            7,
            counts_steps=True,
            low_states=1,
            sources=(source_,),
            passes=PASSES,
            sums=lambda _: (NOTHING,),
            reads_param=lambda h: h[2] != 0,
            keeps_value=True,
            again=(again,),
            taken=(taken,),
            looks=(Streams(STATE, 0),),
            takes=(Streams(PARAM | STATE, PARAM | STATE),),
            freezes=True,
            absorbs=states == 1,
        )
        for name, states, source_ in (
            ("ef_sgd_select", 1, source),
            ("ef_sgd_select_momentum", 2, source_momentum),
        )
    ),
    *(
        Rule(
            name,
            SIGN_HYPER,
            states,
            prepare_sign,
            update_sign,
            5,
            counts_steps=True,
            low_states=1,
            sources=(source_,),
            passes=PASSES,
            applies=Streams(PARAM | STATE, PARAM),
            sums=sign_sums,
            reads_param=lambda h: h[2] != 0,
            keeps_scale=True,
            keeps_value=True,
            again=(again,),
            looks=(Streams(STATE, 0),),
            absorbs=states == 1,
        )
        for name, states, source_ in (
            ("ef_sgd_sign", 1, source_sign),
            ("ef_sgd_sign_momentum", 2, source_sign_momentum),
        )
    ),
)
