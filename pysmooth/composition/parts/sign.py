"""Parts that keep signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...optim._validate import check_flag
from ...optim.adam import check_betas
from ..base import Part, Run


@dataclass(frozen=True)
class Sign(Part):
    """u = sign(u), 0 where it is 0.

    Args:
        scaled: times the mean magnitude of u in the tensor.
    """

    scaled: bool = False

    def __post_init__(self) -> None:
        check_flag("scaled", self.scaled)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Takes signs."""
        return [torch.sign(u) * (u.abs().mean() if self.scaled else 1.0) for u in us]


@dataclass(frozen=True)
class ScaleByLion(Part):
    """u = sign(beta1 * m + (1 - beta1) * u); m = beta2 * m + (1 - beta2) * u: `pysmooth.Lion`.

    Args:
        betas: weights of the interpolation and of the momentum, in [0, 1).
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def state_keys(self) -> tuple[str, ...]:
        """The momentum."""
        return ("exp_avg",)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the momentum."""
        beta1, beta2 = self.betas
        out = []
        for u, state in zip(us, run.states, strict=True):
            m = state["exp_avg"]
            out.append(torch.sign(beta1 * m + (1 - beta1) * u))
            m.mul_(beta2).add_((1 - beta2) * u)
        return out
