"""source and select, in eager torch: rules that look at all parameters before they change one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .storage import Storage


class Runnable(Protocol):
    """A step put together from parts."""

    def run(self, members: Sequence[Member]) -> list[Tensor]:
        """The new parameters; changes the members' states in place."""


class Compressor(Protocol):
    """What error feedback needs of a compressor."""

    def numbered(
        self, xs: Sequence[Tensor], steps: Sequence[int], ids: Sequence[int]
    ) -> list[Tensor]:
        """C of tensors with a step and a number each."""


@dataclass
class Member:
    """One parameter of a step, with what belongs to it, in the dtype that is computed in.

    Attributes:
        p, g: the parameter, and its gradient as the rule is to see it.
        states: the state tensors, to be changed in place.
        hyper: the hyper-parameters of its group, by name.
        first: whether the states hold nothing yet.
        step: how many steps it has seen before, for rules that count.
        number: its place among all parameters of the optimizer.
        group: its group's place.
        scale: what it keeps of the last step's first pass, for rules that do; changed in place.
        storage: what becomes of values that a pass stores.
        is_complex: whether its last dimension is the parts of complex numbers.
        absorbed: whether the states have taken the gradient in already: `g` is not there.
    """

    p: Tensor
    g: Tensor
    states: Sequence[Tensor]
    hyper: dict[str, float]
    first: bool
    step: int
    number: int
    group: int
    scale: Tensor | None
    storage: Storage
    is_complex: bool = False
    absorbed: bool = False


@dataclass
class Passes:
    """What a staged rule may ask about all members together.

    Attributes:
        scopes: "global", "group" or "tensor", per pass.
        compressor: the optimizer's, if it has one.
        chain: the parts of an optimizer that is put together from them.
    """

    scopes: Sequence[str]
    compressor: Compressor | None
    chain: Runnable | None = None

    def norms(
        self, stage: int, members: Sequence[Member], values: Sequence[Tensor]
    ) -> list[Tensor]:
        """For every member the Euclidean norm of its unit's values: float64, shape ()."""
        scope = self.scopes[stage]
        units = [
            0 if scope == "global" else m.group if scope == "group" else m.number for m in members
        ]
        sums: dict[int, Tensor] = {}
        for unit, v in zip(units, values, strict=True):
            square = v.double().square().sum()
            sums[unit] = sums[unit] + square if unit in sums else square
        return [sums[unit].sqrt() for unit in units]

    def means(
        self, stage: int, members: Sequence[Member], values: Sequence[Tensor]
    ) -> list[Tensor]:
        """For every member the mean magnitude of its values, over its tensor: float64, ()."""
        assert self.scopes[stage] == "tensor"
        return [v.double().abs().sum() / v.numel() for v in values]

    def compress(self, members: Sequence[Member], values: Sequence[Tensor]) -> list[Tensor]:
        """C of the members' values, whose elements are numbered in the parameters' order."""
        assert self.compressor is not None
        ordered = [torch.empty_like(m.p).copy_(v) for m, v in zip(members, values, strict=True)]
        return self.compressor.numbered(
            ordered, [m.step for m in members], [m.number for m in members]
        )


def run_chain(members: Sequence[Member], passes: Passes) -> list[Tensor]:
    """The rule of an optimizer that is put together from parts."""
    assert passes.chain is not None
    return passes.chain.run(members)


# Returns the new parameters; changes the members' states in place.
Staged = Callable[[Sequence[Member], Passes], list[Tensor]]
