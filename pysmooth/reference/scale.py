"""x = coef * x: the second half of clip_grad_norm_. Twin of csrc/core/math/scale.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def update(p: Tensor, g: Tensor, states: Sequence[Tensor], *, coef: float, first: bool) -> Tensor:
    """Returns the scaled gradient; `g` already carries the clip coefficient."""
    return g * coef
