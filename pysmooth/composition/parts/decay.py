"""Weight decay, coupled or not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...optim._validate import check_flag, check_number
from ..base import Part, Run


@dataclass(frozen=True)
class Decay(Part):
    """u = u + weight_decay * p; decoupled: p shrinks by lr * weight_decay * p, wherever it stands.

    A decay that is not decoupled acts where it stands: what follows sees it.

    Args:
        weight_decay: at least 0.
        decoupled: whether the parameter shrinks by itself, as AdamW's does.
    """

    weight_decay: float
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay)
        check_flag("decoupled", self.decoupled)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Adds, or notes it down."""
        if not self.decoupled:
            return [u + self.weight_decay * m.p for u, m in zip(us, run.members, strict=True)]
        for i in range(len(us)):
            run.shrink[i] += run.lr(i) * self.weight_decay
        return us
