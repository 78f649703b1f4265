"""AdGD. Twin of csrc/core/math/adgd.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .staged import Member, Passes

HYPER = ("grown", "travel", "still")


def step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; keeps the gradients, and how much they changed."""
    changes = [(m.g - m.states[0]) * (0.0 if m.first else 1.0) for m in members]
    out = []
    for m, changed in zip(members, passes.norms(0, members, changes), strict=True):
        held = torch.where(changed == 0, m.hyper["still"], m.hyper["travel"] / changed)
        size = torch.where(held > m.hyper["grown"], m.hyper["grown"], held)
        out.append(m.p - size.to(m.p.dtype) * m.g)
        m.states[0].copy_(m.g)
        assert m.scale is not None
        m.scale.copy_(changed)
    return out
