"""What engines on a device have in common that take gradients into states before the step."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .device import DeviceEngine, gradient_of
from .recipe import ABSORBED, Recipe

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer


class AbsorbingEngine(DeviceEngine):
    """Takes gradients in one by one, as backward makes them. A subclass enqueues that."""

    def __init__(self) -> None:
        super().__init__()
        self._expected: dict[Tensor, Tensor] = {}  # forms of gradients that were absorbed

    def is_late(self, device: torch.device) -> bool:
        """Whether a device does its work behind the host's back."""
        return device.type != "cpu"

    @abstractmethod
    def holds(self, optimizer: FusedOptimizer, place: int) -> bool:
        """Whether the plan is right for this parameter, its states and the gradient it has."""

    @abstractmethod
    def build(self, optimizer: FusedOptimizer) -> None:
        """Makes a plan for gradients to be taken in."""

    @abstractmethod
    def take_in(self, optimizer: FusedOptimizer, place: int, recipe: Recipe, once: int) -> None:
        """Enqueues what takes the parameter's gradient in.

        `once`: hyper-parameters, as bits, that are 0 for all gradients of a step but the first.
        """

    @torch.no_grad()
    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Takes one gradient into the states, and frees it; False if the policy keeps it out.

        A device that works behind the host's back decides that by itself: True then says nothing,
        and `settle` tells of gradients that were kept out.
        """
        for _ in range(2):
            place = self._places.get(p)
            if place is not None and self.holds(optimizer, place):
                break
            self.build(optimizer)
        else:
            raise RuntimeError("parameters or states changed while a gradient was absorbed")
        assert place is not None
        member = self._members[place]
        if p.numel() > 0:
            group = optimizer.param_groups[member.group]
            first, later = (optimizer.absorbing(group, first=f) for f in (True, False))
            pairs = zip(first.hyper, later.hyper, strict=True)
            once = sum(1 << i for i, (a, b) in enumerate(pairs) if a != b and b == 0)
            self.take_in(optimizer, place, first, once)
            torch.autograd.graph.increment_version(list(member.held.values()))
            held = optimizer.state[p]
            before = held.get(ABSORBED)
            held[ABSORBED] = (before or 0) + 1
            if self._kept_out():
                held[ABSORBED] = before
                if before is None:
                    del held[ABSORBED]
                self.forget(optimizer, list(self._fresh))
                return False
        self._fresh = {}
        p.grad = None
        return True

    def _kept_out(self) -> bool:
        """Whether a device that the host need not wait for has just kept a gradient out."""
        told = self._told
        assert told is not None
        if self.is_late(told.skipped.device) or not int(told.skipped):
            return False
        told.skipped.zero_()
        told.spoiled.zero_()
        return True

    def form_of(self, optimizer: FusedOptimizer, p: Tensor) -> Tensor:
        """The gradient, or what it will look like. Where it is absorbed, without its memory."""
        if not optimizer.absorbs:
            return gradient_of(p)
        if p.grad is not None:
            self._expected[p] = stand_in(gradient_of(p))
        return self._expected.get(p, p)

    def forget_absorbed(self, optimizer: FusedOptimizer) -> list[Tensor]:
        """After a step: what was taken in counts no more. Returns whose that was."""
        found = [p for p, held in optimizer.state.items() if held.get(ABSORBED)]
        for p in found:
            optimizer.state[p][ABSORBED] = 0
        return found


def stand_in(grad: Tensor) -> Tensor:
    """A tensor of the same form, without memory: a plan outlives the gradients it was made for."""
    size = 1 + sum((n - 1) * s for n, s in zip(grad.shape, grad.stride(), strict=True))
    unaligned = int(grad.data_ptr() % 16 != 0)
    memory = torch.empty(max(size, 0) + 1, dtype=grad.dtype, device="meta")
    return memory.as_strided(grad.shape, grad.stride(), unaligned)
