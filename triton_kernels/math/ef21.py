"""EF21 on one worker. Twin of csrc/core/math/ef21.h."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl

from ..compress import compress, compress_draw, compress_sum, scales
from ..rule import GRAD, NOTHING, PARAM, SQUARES, STAGE, STATE, WIDE, Rule, Streams


@triton.jit
def constants(h, summed, norm, wide):
    """1 - eta, eta, shrink, lr or lr / norm, compressor, level, its scales, lr."""
    lr, eta, weight_decay, normalize, kind, level, _, _ = h
    step = tl.where(norm == 0, 0.0, lr / norm)
    step = tl.where(normalize == 0, lr, step)
    scale, inverse = scales(kind, level, summed, wide)
    return 1.0 - eta, eta, 1.0 - lr * weight_decay, step, kind, level, scale, inverse, lr


@triton.jit
def prepare(h, x):
    """Of the compressor's scale and the norm."""
    return constants(h, x[STAGE], x[STAGE + 1], x[WIDE])


@triton.jit
def estimate(distance, s, h, drawn):
    """h + C(w - h)."""
    return s[0] + compress(distance, h[4], h[5], h[6], h[7], drawn)


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
def change(p, g, s, h, drawn=None):
    """h = h + C(g - h), of which the norm is taken."""
    moved = estimate(g - s[0], s, h, drawn)
    return moved, p, (moved,)


@triton.jit
def change_m(p, g, s, h, drawn=None):
    """The same towards v."""
    moved = estimate(s[1] - s[0], s, h, drawn)
    return moved, p, (moved, s[1])


@triton.jit
def change_2m(p, g, s, h, drawn=None):
    """The same towards u."""
    moved = estimate(s[2] - s[0], s, h, drawn)
    return moved, p, (moved, s[1], s[2])


@triton.jit
def update(p, g, s, h):
    """p = (1 - lr * weight_decay) * p - lr * h, or lr * h / ||h||."""
    return p * h[2] - s[0] * h[3], s


# ---- selecting compressors -----------------------------------------------------------------------


@triton.jit
def step_m0(p, g, s, h):
    """One pass for all: the parameter steps along the old h, and is repaired where h changes."""
    value, _, states = source(p, g, s, h)
    return value, p * h[2] - s[0] * h[8], states


@triton.jit
def step_m(p, g, s, h):
    """The same towards v."""
    value, _, states = source_m(p, g, s, h)
    return value, p * h[2] - s[0] * h[8], states


@triton.jit
def step_2m(p, g, s, h):
    """The same towards u."""
    value, _, states = source_2m(p, g, s, h)
    return value, p * h[2] - s[0] * h[8], states


@triton.jit
def held(p, g, s, h):
    """h, of which the norm is taken."""
    return s[0], p, s


@triton.jit
def again(g, s):
    """w - h once more."""
    return g - s[0]


@triton.jit
def again_m(g, s):
    """The same towards v."""
    return s[1] - s[0]


@triton.jit
def again_2m(g, s):
    """The same towards u."""
    return s[2] - s[0]


@triton.jit
def taken(p, s, c, h):
    """A chosen coordinate comes through."""
    return p, (s[0] + c,) + s[1:]


@triton.jit
def taken_repaired(p, s, c, h):
    """The same, where the parameter has stepped without it."""
    return p - c * h[8], (s[0] + c,) + s[1:]


def sums(h: Sequence[float]) -> tuple[int, ...]:
    """The compressor's scale; the norm, where steps are normalised."""
    return compress_sum(h[4]), SQUARES if h[3] != 0 else NOTHING


HYPER = ("lr", "eta", "weight_decay", "normalize", "compressor", "level", "seed_low", "seed_high")
MOMENTA = ("", "_m", "_2m")
DENSE = ((source, change), (source_m, change_m), (source_2m, change_2m))
ONE_PASS = (step_m0, step_m, step_2m)
AGAIN = (again, again_m, again_2m)


def rules() -> Iterator[Rule]:
    """For dense compressors; for those that select; for these with normalised steps."""
    for k, momenta in enumerate(MOMENTA):
        given = GRAD if k == 0 else STATE << k  # what h follows
        first = Streams(GRAD | 7 * STATE, 6 * STATE)
        applies = Streams(PARAM | STATE, PARAM)
        yield Rule(
            f"ef21_dense{momenta}",
            HYPER,
            1 + k,
            prepare,
            update,
            9,
            counts_steps=True,
            sources=DENSE[k],
            passes=(first, Streams(given | STATE, STATE, draws=True)),
            applies=applies,
            sums=sums,
            again=AGAIN[k : k + 1],
            looks=(Streams(given | STATE, 0),),
            scales=(6,),
            draws=lambda h: compress_draw(h[4:]),
        )
        yield Rule(
            f"ef21_select{momenta}",
            HYPER,
            1 + k,
            prepare,
            None,
            9,
            counts_steps=True,
            sources=(ONE_PASS[k],),
            passes=(Streams(PARAM | GRAD | 7 * STATE, PARAM | 6 * STATE),),
            sums=lambda _: (NOTHING,),
            again=AGAIN[k : k + 1],
            taken=(taken_repaired,),
            looks=(Streams(given | STATE, 0),),
            takes=(Streams(PARAM | given | STATE, PARAM | STATE),),
        )
        yield Rule(
            f"ef21_select_normalized{momenta}",
            HYPER,
            1 + k,
            prepare,
            update,
            9,
            counts_steps=True,
            sources=(DENSE[k][0], held),
            passes=(first, Streams(STATE, 0)),
            applies=applies,
            sums=lambda h: (NOTHING, sums(h)[1]),
            again=AGAIN[k : k + 1],
            taken=(taken,),
            looks=(Streams(given | STATE, 0),),
            takes=(Streams(given | STATE, STATE),),
        )


RULES = tuple(rules())
