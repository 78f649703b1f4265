"""SGD with normalised momentum. Twin of csrc/core/math/normalized_sgd.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rule import FIRST, GRAD, PARAM, SQUARES, STAGE, STATE, Rule, Streams


@triton.jit
def prepare(h, x):
    """momentum, 1 - momentum, shrink, lr / norm."""
    lr, momentum, eps, weight_decay = h
    first = x[FIRST] != 0
    norm = x[STAGE]
    return (
        tl.where(first, 0.0, momentum),
        tl.where(first, 1.0, 1.0 - momentum),
        1.0 - lr * weight_decay,
        tl.where(norm == 0, 0.0, lr / (norm + eps)),
    )


@triton.jit
def source(p, g, s, h):
    """m = momentum * m + (1 - momentum) * g, of which the norm is taken."""
    m = s[0] * h[0] + g * h[1]
    return m, p, (m,)


@triton.jit
def update(p, g, s, h):
    """p = (1 - lr * weight_decay) * p - lr * m / (||m|| + eps)."""
    return p * h[2] - s[0] * h[3], s


RULES = (
    Rule(
        "normalized_sgd",
        ("lr", "momentum", "eps", "weight_decay"),
        1,
        prepare,
        update,
        4,
        sources=(source,),
        passes=(Streams(GRAD | STATE, STATE),),
        applies=Streams(PARAM | STATE, PARAM),
        sums=lambda _: (SQUARES,),
    ),
)
