"""What a method of averaging is: what a worker does, what is sent, what is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .wire import Draw


@dataclass
class Slot:
    """One parameter: its place, and the states of this rank.

    What a step changes is staged beside what is, until the optimizer's step has happened.
    """

    name: str
    index: int
    numel: int
    device: torch.device
    owner: int = 0  # the parameter's id, by which the optimizer knows it
    lr: float = 0.0  # of this step
    steps: int = 0  # that it took part in
    states: dict[str, Tensor] = field(default_factory=dict)
    staged: dict[str, Tensor] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)

    def state(self, key: str, numel: int | None = None) -> Tensor:
        """As the last step left it; zeros at first. As long as the parameter, or of `numel`."""
        if key not in self.states:
            size = self.numel if numel is None else numel
            self.states[key] = torch.zeros(size, device=self.device)
        return self.states[key]

    def stage(self, key: str) -> Tensor:
        """Room for what a state is to become."""
        if key not in self.staged:
            self.staged[key] = torch.empty_like(self.state(key))
        self.touched.add(key)
        return self.staged[key]

    def commit(self) -> None:
        """What was staged is what is."""
        for key in self.touched:
            self.states[key], self.staged[key] = self.staged[key], self.states[key]
        self.steps += bool(self.touched)
        self.touched.clear()


@dataclass(frozen=True)
class Context:
    """Who is who in this step."""

    rank: int
    ranks: int
    step: int

    def draw(self, slot: Slot, *, shared: bool = False) -> Draw:
        """The random numbers of a tensor; `shared`: the same on all ranks."""
        return Draw(0 if shared else self.rank, self.step, slot.index)


class Method:
    """The base class. Tensors are flat and float32; `grad` is this rank's own gradient.

    Raises:
        ValueError: an argument is out of range.
    """

    #: Whether everything is needed at once: then nothing is sent before backward is done.
    joint = False
    #: Whether the learning rate enters what is sent.
    uses_lr = False
    #: Whether messages go to a server for each share first: `encode`, `serve`, `decode`.
    two_phase = False

    def size(self, d: int, ranks: int) -> int:
        """Bytes of a message about d numbers; of one share where there are two phases."""
        raise NotImplementedError

    def prepare(self, context: Context, grads: list[tuple[Slot, Tensor]]) -> None:
        """Looks at all gradients before any is encoded; where `joint`."""

    def dense(self, slot: Slot) -> bool:
        """Whether this step averages the gradient as it is, to begin from."""
        return False

    def begin(self, slot: Slot, grad: Tensor, mean: Tensor | None) -> None:
        """After a dense step; no mean where another rank has it, as that of FSDP2's shard."""

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """What a worker does: writes its message (a row for each server where two-phase).

        Returns whether the gradient was finite, and all that came of it.
        """
        raise NotImplementedError

    def serve(self, context: Context, slot: Slot, messages: Tensor, reply: Tensor) -> None:
        """What a server does with its share of everybody's message."""
        raise NotImplementedError

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """What everybody does with everybody's message: `out` is the gradient to step with."""
        raise NotImplementedError

    def regroup(self, slot: Slot) -> None:
        """States of another number of ranks, as rank 0 saved them, become this rank's."""
        slot.states.clear()
