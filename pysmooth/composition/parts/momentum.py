"""Parts that average updates over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ...optim._validate import check_below_one, check_choice, check_flag, check_number
from ..base import Part, Run, Start


@dataclass(frozen=True)
class Momentum(Part):
    """m = momentum * m + (1 - dampening) * u (m = u at first); u = m, as torch.optim.SGD has it.

    Args:
        momentum: greater than 0.
        dampening: of u.
        nesterov: u = u + momentum * m instead; without dampening.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, strict=True)
        check_number("dampening", self.dampening, low=-math.inf)
        check_flag("nesterov", self.nesterov)
        if self.nesterov and self.dampening != 0:
            raise ValueError("nesterov needs dampening = 0")

    def state_keys(self) -> tuple[str, ...]:
        """The momentum."""
        return ("momentum_buffer",)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the momentum."""
        out = []
        for u, m, state in zip(us, run.members, run.states, strict=True):
            buffer = state["momentum_buffer"]
            buffer.copy_(u if m.first else self.momentum * buffer + (1 - self.dampening) * u)
            out.append(u + self.momentum * buffer if self.nesterov else buffer.clone())
        return out


@dataclass(frozen=True)
class Average(Part):
    """m = decay * m + (1 - decay) * u; u = m.

    Args:
        decay: in [0, 1).
        start: m before the first step: "zero", or "first": m = u in it.
    """

    decay: float = 0.9
    start: Start = "zero"

    def __post_init__(self) -> None:
        check_below_one("decay", self.decay)
        check_choice("start", self.start, ("zero", "first"))

    def state_keys(self) -> tuple[str, ...]:
        """The average."""
        return ("momentum_buffer",)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the average."""
        out = []
        for u, m, state in zip(us, run.members, run.states, strict=True):
            buffer = state["momentum_buffer"]
            at_once = m.first and self.start == "first"
            buffer.copy_(u if at_once else self.decay * buffer + (1 - self.decay) * u)
            out.append(buffer.clone())
        return out
