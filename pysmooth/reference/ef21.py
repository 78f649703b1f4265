"""EF21 on one worker, with any number of momenta. Twin of csrc/core/math/ef21.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .staged import Member, Passes

HYPER = (
    *("lr", "eta", "weight_decay", "normalize"),
    *("compressor", "level", "seed_low", "seed_high"),
)


def dense(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; updates the estimate and the momenta."""
    for m, c in zip(members, _sent(members, passes), strict=True):
        m.states[0].add_(c)
    return _step(members, passes, [_along(m) for m in members])


def select(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """The same for compressors that select."""
    out = []
    for m, c in zip(members, _sent(members, passes), strict=True):
        lr = m.hyper["lr"]
        # In two steps, as the fused pass takes them: along the old estimate, then along what came.
        moved = m.p * (1 - lr * m.hyper["weight_decay"]) - lr * m.states[0]
        out.append(m.storage.settled_param(moved) - lr * c)
        m.states[0].add_(c)
    return _step(members, passes, out)


def plus(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """EF21+: per unit, C(w) where that is closer to w than the estimate h + C(w - h) is."""
    targets = smoothed(members)
    estimates = [m.states[0] for m in members]
    through = passes.compress(members, [w - h for w, h in zip(targets, estimates, strict=True)])
    moved = [h + c for h, c in zip(estimates, through, strict=True)]
    direct = passes.compress(members, targets)
    # Per unit that the compressor looks at.
    error = passes.norms(2, members, [w - h for w, h in zip(targets, moved, strict=True)])
    other = passes.norms(3, members, [w - c for w, c in zip(targets, direct, strict=True)])
    for m, a, b, h, c in zip(members, error, other, moved, direct, strict=True):
        m.states[0].copy_(torch.where(b < a, c, h))
    return _step(members, passes, [_along(m) for m in members])


def _along(m: Member) -> Tensor:
    return m.p * (1 - m.hyper["lr"] * m.hyper["weight_decay"]) - m.hyper["lr"] * m.states[0]


def _sent(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """C(w - h), the momenta being brought up to date."""
    targets = smoothed(members)
    return passes.compress(
        members, [w - m.states[0] for m, w in zip(members, targets, strict=True)]
    )


def smoothed(members: Sequence[Member]) -> list[Tensor]:
    """Updates the momenta; returns what the estimates follow: the last one, or the gradient."""
    out = []
    for m in members:
        w = m.g
        for buffer in m.states[1:]:
            eta = m.hyper["eta"]
            w = buffer.copy_((1 - eta) * buffer + eta * w)
        out.append(w)
    return out


def _step(members: Sequence[Member], passes: Passes, plain: list[Tensor]) -> list[Tensor]:
    """The new parameters: `plain`, or for members that normalise a step of length lr."""
    norms = passes.norms(-1, members, [m.states[0] for m in members])
    out = []
    for m, norm, p in zip(members, norms, plain, strict=True):
        lr = m.hyper["lr"]
        size = torch.where(norm == 0, 0.0, lr / norm)
        step = m.p * (1 - lr * m.hyper["weight_decay"]) - size.to(m.p.dtype) * m.states[0]
        out.append(step if m.hyper["normalize"] else p)
    return out
