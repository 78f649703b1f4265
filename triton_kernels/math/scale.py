"""x = coef * clip coefficient * x. Twin of csrc/core/math/scale.h."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it

from ..rule import COEF, Rule


@triton.jit
def prepare(h, x):
    """One factor."""
    return (h[0] * x[COEF],)


@triton.jit
def update(p, g, s, h):
    """Scales, in place."""
    return p * h[0], s


RULES = (Rule("scale", ("coef",), 0, prepare, update, 1, reads_grad=False),)
