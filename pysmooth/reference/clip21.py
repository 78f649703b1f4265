"""Clip21 and Clip21-SGD2M on one worker. Twin of csrc/core/math/clip21.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import random
from .order import unflatten
from .staged import Member, Passes

HYPER = (
    *("lr", "tau", "beta", "beta_hat", "weight_decay"),
    *("noise_std", "seed_low", "seed_high"),
)


def step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; updates the estimate, and the momentum where there is one."""
    _clipped(members, passes, [m.states[1:] for m in members])
    return [_moved(m, m.states[0]) for m in members]


def noisy(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """The same along the server's estimate, the last state, which receives noise."""
    clipped = _clipped(members, passes, [m.states[1:-1] for m in members])
    for m, u in zip(members, clipped, strict=True):
        seed = int(m.hyper["seed_low"]) | int(m.hyper["seed_high"]) << 32
        noise = random.normal(m.p.numel(), seed=seed, step=m.step, tensor_id=m.number)
        noise = unflatten(m.p, noise.to(m.p)) * m.hyper["noise_std"]
        m.states[-1].add_((noise + u) * m.hyper["beta_hat"])
    return [_moved(m, m.states[-1]) for m in members]


def _moved(m: Member, estimate: Tensor) -> Tensor:
    lr = m.hyper["lr"]
    return m.p * (1 - lr * m.hyper["weight_decay"]) - lr * estimate


def _clipped(
    members: Sequence[Member], passes: Passes, momenta: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Updates momenta, at most one each, and estimates; returns the clipped distances."""
    distances = []
    for m, momentum in zip(members, momenta, strict=True):
        v = m.g
        for buffer in momentum:
            beta = m.hyper["beta"]
            v = buffer.copy_((1 - beta) * buffer + beta * m.g)
        distances.append(v - m.states[0])
    norms = passes.norms(0, members, distances)
    out = []
    for m, distance, norm in zip(members, distances, norms, strict=True):
        tau = m.hyper["tau"]
        coef = torch.where(norm > tau, tau / norm, torch.where(norm.isnan(), norm, 1.0))
        out.append(distance * coef.to(distance.dtype))
        m.states[0].add_(out[-1] * m.hyper["beta_hat"])
    return out
