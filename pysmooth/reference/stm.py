"""(L0,L1)-STM. Twin of csrc/core/math/stm.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

HYPER = ("step", "keep", "admit", "near", "ahead")


def update(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    *,
    step: float,
    keep: float,
    admit: float,
    near: float,
    ahead: float,
    first: bool,
) -> Tensor:
    """Returns the new parameter; updates y and z, which start at the parameter."""
    y, z = states
    if first:
        y.copy_(p)
        z.copy_(p)
    z.sub_(step * g)
    y.copy_(keep * y + admit * z)
    return near * y + ahead * z
