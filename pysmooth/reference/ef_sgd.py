"""SGD with error feedback. Twin of csrc/core/math/ef_sgd.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import compress
from .staged import Member, Passes

HYPER = ("lr", "momentum", "weight_decay", "compressor", "level", "seed_low", "seed_high")
SIGN_HYPER = ("lr", "momentum", "weight_decay")


def _take_in(m: Member, residual: Tensor) -> None:
    """Keeps what goes into the compressor: as it is stored, so that this is what is sent."""
    g = m.g
    if m.hyper["weight_decay"] != 0:
        g = g + m.hyper["weight_decay"] * m.p
    for buffer in m.states[1:]:
        g = buffer.copy_(m.hyper["momentum"] * buffer + g)
    m.states[0].copy_(m.storage.settled_state(0, residual + m.hyper["lr"] * g))


def absorb(m: Member) -> None:
    """Adds the gradient to the residual."""
    _take_in(m, m.states[0])


def absorb_sign(m: Member) -> None:
    """Adds it to what went into the compressor, without what that sent."""
    assert m.scale is not None
    _take_in(m, m.states[0] - compress.scaled_sign(m.states[0], m.scale))
    m.scale.zero_()


def step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """Returns the new parameters; updates the residual, and the momentum where there is one."""
    for m in members:
        if not m.absorbed:
            absorb(m)
    sending = [m for m in members if m.hyper["lr"] != 0]
    sent = passes.compress(sending, [m.states[0] for m in sending])
    new = {m.number: m.p for m in members}
    for m, c in zip(sending, sent, strict=True):
        new[m.number] = m.p - c
        m.states[0].sub_(c)
    return [new[m.number] for m in members]


def sign_step(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """The same for the scaled sign, with what went into it and its scale as states."""
    for m in members:
        if not m.absorbed:
            absorb_sign(m)
    sending = [m for m in members if m.hyper["lr"] != 0]
    sent = passes.compress(sending, [m.states[0] for m in sending])
    new = {m.number: m.p for m in members}
    for m, c in zip(sending, sent, strict=True):
        assert m.scale is not None
        new[m.number] = m.p - c
        m.scale.copy_(c.flatten()[0].abs())
    return [new[m.number] for m in members]
