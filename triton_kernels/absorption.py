"""The launches that take a gradient in when backward has made it (absorb.py), and their tables."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .absorb import DOOR, WORDS, begin_absorbed
from .launch import Launch, Spec, current_stream
from .rules import RULES
from .specs import absorb_spec, admit_spec
from .tuning import INTERPRETED

if TYPE_CHECKING:
    from .plan import Plan, Slot
    from .words import Words


class Numbers(NamedTuple):
    """What one gradient is taken in with.

    Attributes:
        hyper: of its group.
        once: hyper-parameters, as bits, that are 0 for all gradients of a step but the first.
        maximize: whether it counts with the other sign.
        lr: the first hyper-parameter, where that is a tensor on the device.
    """

    hyper: Sequence[float]
    once: int = 0
    maximize: bool = False
    lr: Tensor | None = None


class Absorption:
    """What a plan's tensors have taken in since the last step, and how they do that."""

    def __init__(self, plan: Plan) -> None:
        device, count = plan.device, max(1, len(plan.slots))
        self._plan = plan
        taken = [s.absorbed for s in plan.slots] or [0]
        self.taken = torch.tensor(taken, dtype=torch.int64).to(device)  # gradients, per tensor
        self._gradients = torch.zeros(count, dtype=torch.int64, device=device)
        self._rates = torch.zeros(count, dtype=torch.float64, device=device)
        self._doors = torch.zeros(count * DOOR.value, dtype=torch.int32, device=device)
        self._flags = torch.zeros(max(1, plan.chunks), dtype=torch.int32, device=device)
        self._launches = [
            self._of(t, s) if s.param.numel() else () for t, s in enumerate(plan.slots)
        ]

    def _of(self, t: int, s: Slot) -> tuple[Launch, ...]:
        """The launches of one tensor: look, where the policy asks; admit; the pass."""
        plan, method = self._plan, self._plan.method
        form, rule = plan.work_of[t].form, RULES[s.rule]
        chunks = plan.chunks_of([t])
        numbers, programs = plan.numbers_of(form), len(chunks[0])
        out = []
        if (spec := plan.looks[t]) is not None:
            given = (plan.rows, plan.layouts, *chunks, self._flags)
            out.append(Launch(spec, programs, given))
        own = (self._rates, self.taken, plan.counters, plan.spoiled, numbers, plan.keys)
        tables = (plan.rows, self._gradients, self._flags, *own, self._doors)
        out.append(Launch(admit_spec(rule, form, method), 1, tables))
        door = self._doors[t * DOOR.value :]
        given = (plan.rows, self._gradients, plan.layouts, *chunks, numbers, plan.keys, door)
        nothing = (plan.partials, plan.partials, *(self._flags,) * 4)
        spec = absorb_spec(rule, form, s.hyper, method.zero)
        out.append(Launch(spec, programs, (*given, *nothing)))
        return tuple(out)

    def take_in(self, t: int, address: int, numbers: Numbers) -> None:
        """Adds the gradient at this address to tensor t's states, unless the policy refuses."""
        if not (launches := self._launches[t]):
            return
        if numbers.lr is not None:
            self._rates[t].copy_(numbers.lr.reshape(()), non_blocking=True)
        hyper = [*numbers.hyper, *[0.0] * (WORDS - len(numbers.hyper))]
        bits = struct.unpack(f"={WORDS}q", struct.pack(f"={WORDS}d", *hyper))
        sign = -1 if numbers.maximize else 1
        stream = None if INTERPRETED else current_stream(self._plan.device)
        *looks, admits, passes = launches
        for launch in looks:
            launch(stream, (address,))
        admits(stream, (t, address, int(numbers.lr is not None), sign, numbers.once, *bits))
        passes(stream)

    def begin(self, words: Words) -> Launch:
        """What tells a step who takes part in it."""
        count = len(self._plan.slots)
        programs = -(-count // tuning.FINALIZE_SPAN)
        return Launch(BEGIN_ABSORBED, programs, (self.taken, words.gradients, count))


BEGIN_ABSORBED = Spec(begin_absorbed, (("SPAN", tuning.FINALIZE_SPAN),), tuning.FINALIZE_WARPS)
