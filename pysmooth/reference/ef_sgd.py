"""SGD with error feedback. Twin of csrc/core/math/ef_sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .staged import Member, Passes

HYPER = ("lr", "momentum", "weight_decay", "codec", "level")


def step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; updates the residual, and the momentum where there is one."""
    for m in members:
        residual, *momentum = m.states
        g = m.g
        if m.hyper["weight_decay"] != 0:
            g = g + m.hyper["weight_decay"] * m.p
        for buffer in momentum:
            g = buffer.copy_(m.hyper["momentum"] * buffer + g)
        residual.copy_(residual + m.hyper["lr"] * g)
    sending = [m for m in members if m.hyper["lr"] != 0]
    sent = passes.compress(sending, [m.states[0] for m in sending])
    new = {m.number: m.p for m in members}
    for m, c in zip(sending, sent, strict=True):
        new[m.number] = m.p - c
        m.states[0].sub_(c)
    return [new[m.number] for m in members]
