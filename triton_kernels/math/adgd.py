"""AdGD. Twin of csrc/core/math/adgd.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rule import FIRST, GRAD, PARAM, SQUARES, STAGE, STATE, Rule, Streams


@triton.jit
def prepare(h, x):
    """The step size; 0 where a first gradient is no change, else 1."""
    grown, travel, still = h
    changed = x[STAGE]
    held = tl.where(changed == 0, still, travel / changed)
    size = tl.where(held > grown, grown, held)
    return size, tl.where(x[FIRST] != 0, 0.0, 1.0)


@triton.jit
def source(p, g, s, h):
    """How the gradient changed, of which the norm is taken."""
    return (g - s[0]) * h[1], p, s


@triton.jit
def update(p, g, s, h):
    """p -= size * g, and the gradient is kept."""
    return p - g * h[0], (g,)


RULES = (
    Rule(
        "adgd",
        ("grown", "travel", "still"),
        1,
        prepare,
        update,
        2,
        sources=(source,),
        passes=(Streams(GRAD | STATE, 0),),
        applies=Streams(PARAM | GRAD, PARAM | STATE),
        sums=lambda _: (SQUARES,),
        keeps_scale=True,
    ),
)
