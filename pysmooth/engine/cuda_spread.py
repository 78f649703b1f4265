"""Sums of a plan of the CUDA backend that go over processes, between two phases of launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .spread import Spread, Sums

if TYPE_CHECKING:
    from .._cuda import Plan
    from .cuda_memory import PlanMemory

PART_COLUMNS, DIGITS = 4, 2048  # as csrc/cuda/plan.h has them


class CudaSpread(Spread):
    """Knows where in a plan's memory they are."""

    def __init__(self, sums: Sums, jointly: bool) -> None:
        super().__init__(sums, jointly)
        self._plan: Plan | None = None
        self._rows: dict[str, Tensor] = {}
        self._selecting: list[int] = []

    @property
    def joins(self) -> bool:
        """Whether there are stages of a pipeline."""
        return self.sums.process_group is not None

    def use(self, plan: Plan, memory: PlanMemory, torn: Tensor) -> None:
        """From now on it is this plan, in this memory."""
        (site,) = plan.sites
        at, self._selecting = site.exchanged
        self._plan = plan

        def rows(name: str, dtype: torch.dtype, count: int, columns: int) -> Tensor:
            first = at[name]
            bytes_ = memory.plan[first : first + count * columns * dtype.itemsize]
            return bytes_.view(dtype).view(count, columns)

        self._rows = {
            "parts": rows("parts", torch.float64, len(self.sums.layouts), PART_COLUMNS),
            "histograms": rows("histograms", torch.int64, len(self._selecting), DIGITS),
        }
        if self.joins:
            self._rows["joined"] = rows("joined", torch.float64, 1, site.joined).view(-1)
        self.watch(torn)

    def meet(self, phase: int) -> None:
        """After the launches of this phase."""
        assert self._plan is not None
        kind, largest, count = self._plan.meeting(phase)
        if kind.name == "PARTS":
            self.sums.parts(self._rows["parts"], largest=largest)
        elif kind.name == "UNITS":
            self.sums.units(self._rows["joined"][:count], largest=largest)
        else:
            self.sums.histograms(self._rows["histograms"], self._selecting)
