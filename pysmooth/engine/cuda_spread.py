"""A plan's sums that go over processes, where its tensors are parts of larger ones.

Between two phases of launches the plan's memory holds what this process has, a row per tensor or
unit; an exchange (pysmooth/distributed/sharded_device.py) adds that up in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .cuda_memory import is_late

if TYPE_CHECKING:
    from .._cuda import Plan
    from .cuda_memory import PlanMemory

PART_COLUMNS, DIGITS = 4, 2048  # as csrc/cuda/plan.h has them


class Sums(Protocol):
    """What adds up over processes."""

    layouts: Sequence[Any]
    process_group: Any
    empty_live: tuple[bool, ...]

    def parts(self, rows: Tensor, *, largest: bool) -> None:
        """Rows of tensors, float64."""

    def units(self, numbers: Tensor, *, largest: bool) -> None:
        """Numbers of scope units, float64, over the stages of a pipeline."""

    def histograms(self, counts: Tensor, tensors: Sequence[int]) -> None:
        """Rows of these tensors, int64."""

    def note(self, torn: Tensor) -> None:
        """Adds to the number that the host looks at what kernels do not know."""

    def complain(self, torn: int) -> None:
        """Raises RuntimeError if that number is not 0."""


class Spread:
    """Parts of tensors in one plan after the other.

    Args:
        sums: what adds up over the processes.
        jointly: whether the k largest are those of all parts of a tensor.
    """

    def __init__(self, sums: Sums, jointly: bool) -> None:
        self.sums, self.jointly = sums, jointly
        self._plan: Plan | None = None
        self._rows: dict[str, Tensor] = {}
        self._torn = self._seen = torch.zeros(1, dtype=torch.int64)
        self._selecting: list[int] = []

    @property
    def joins(self) -> bool:
        """Whether there are stages of a pipeline."""
        return self.sums.process_group is not None

    def parts(self, params: Sequence[Tensor]) -> list[tuple[int, int, bool]]:
        """What a plan is told of each parameter."""
        live = iter(self.sums.empty_live)
        out = []
        for p, layout in zip(params, self.sums.layouts, strict=True):
            begin = layout.begin if self.jointly and layout.groups else -1
            out.append((layout.elements, begin, p.numel() == 0 and next(live)))
        return out

    def use(self, plan: Plan, memory: PlanMemory, torn: Tensor) -> None:
        """From now on it is this plan, in this memory."""
        (site,) = plan.sites
        at, self._selecting = site.exchanged
        tensors, units = len(self.sums.layouts), len(self._selecting)
        self._plan = plan

        def rows(name: str, dtype: torch.dtype, count: int, columns: int) -> Tensor:
            first = at[name]
            bytes_ = memory.plan[first : first + count * columns * dtype.itemsize]
            return bytes_.view(dtype).view(count, columns)

        self._rows = {
            "parts": rows("parts", torch.float64, tensors, PART_COLUMNS),
            "histograms": rows("histograms", torch.int64, units, DIGITS),
        }
        if self.joins:
            self._rows["joined"] = rows("joined", torch.float64, 1, site.joined).view(-1)
        self._torn = torn
        late = is_late(memory.device)
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=late)

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

    def look(self) -> bool:
        """Whether a step before this one, as far as it is known by now, went wrong."""
        return bool(self._seen)

    def after(self) -> None:
        """All of a step is enqueued: what is wrong with it, the next one may see."""
        self.sums.note(self._torn)
        self._seen.copy_(self._torn, non_blocking=True)
