"""What every contestant is given: parameters with gradients, and how to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from pysmooth.engine.backends import Backend

Step = Callable[[], object]


@dataclass
class Problem:
    """Parameters with gradients, and what to do with them; shared by all contestants."""

    params: list[Tensor]
    lr: float
    momentum: float
    max_norm: float
    recorded: list[Tensor] | None = None  # the gradients, to be put back before every call
    backend: Backend = "auto"  # pysmooth's

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes what clipping did to the gradients: else only the first call would clip."""
        if self.recorded is not None:
            torch._foreach_copy_([p.grad for p in self.params if p.grad is not None], self.recorded)


def keeping(step: Step, keeps: object) -> Step:
    """The step, with what it keeps between calls noted: an optimizer, or lists of states."""
    step.keeps = keeps  # type: ignore[attr-defined]
    return step


def torch_step(problem: Problem, optimizer: torch.optim.Optimizer) -> Step:
    """An optimizer of torch's interface, after torch's clip_grad_norm_."""

    def step() -> None:
        clip_grad_norm_(problem.params, problem.max_norm)
        optimizer.step()

    return keeping(step, optimizer)
