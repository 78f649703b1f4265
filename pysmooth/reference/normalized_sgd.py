"""SGD with normalised momentum. Twin of csrc/core/math/normalized_sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .staged import Member, Passes

HYPER = ("lr", "momentum", "eps", "weight_decay")


def step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; updates the momenta in place."""
    for m in members:
        (v,) = m.states
        beta = m.hyper["momentum"]
        v.copy_(m.g if m.first else beta * v + (1 - beta) * m.g)
    norms = passes.norms(0, members, [m.states[0] for m in members])
    out = []
    for m, norm in zip(members, norms, strict=True):
        lr = m.hyper["lr"]
        size = torch.where(norm == 0, 0.0, lr / (norm + m.hyper["eps"]))
        out.append(m.p * (1 - lr * m.hyper["weight_decay"]) - size.to(m.p.dtype) * m.states[0])
    return out
