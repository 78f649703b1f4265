"""(L0,L1)-STM. Twin of csrc/core/math/stm.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rule import FIRST, Rule


@triton.jit
def prepare(h, x):
    """The weights, and whether y and z start."""
    step, keep, admit, near, ahead = h
    return step, keep, admit, near, ahead, tl.where(x[FIRST] != 0, 1.0, 0.0)


@triton.jit
def update(p, g, s, h):
    """z -= step * g; y = keep * y + admit * z; p = near * y + ahead * z."""
    step, keep, admit, near, ahead, first = h
    y = tl.where(first != 0, p, s[0])
    z = tl.where(first != 0, p, s[1]) - g * step
    y = y * keep + z * admit
    return y * near + z * ahead, (y, z)


RULES = (Rule("stm", ("step", "keep", "admit", "near", "ahead"), 2, prepare, update, 6),)
