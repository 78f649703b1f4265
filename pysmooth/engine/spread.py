"""Parameters that are parts of larger ones, on a device: what its engines have in common.

Kernels leave what this process has in the plan's memory; an exchange
(pysmooth/distributed/sharded_device.py) adds that up in place, over the processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .cuda_memory import is_late


class Sums(Protocol):
    """What adds up over processes."""

    layouts: Sequence[Any]
    begins: Sequence[int]  # where each part begins in the whole, as far as that is known
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
        self._torn = self._seen = torch.zeros(1, dtype=torch.int64)

    def parts(self, params: Sequence[Tensor]) -> list[tuple[int, int, bool]]:
        """Of each: elements of the whole; where the part begins, or -1; an empty one takes part."""
        live = iter(self.sums.empty_live)
        out = []
        for p, layout, first in zip(params, self.sums.layouts, self.sums.begins, strict=True):
            begin = first if self.jointly and layout.groups else -1
            out.append((layout.elements, begin, p.numel() == 0 and next(live)))
        return out

    def watch(self, torn: Tensor) -> None:
        """From now on this is the number that is not 0 after a step that went wrong."""
        self._torn = torn
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=is_late(torn.device))

    def add_up(self, rows: Tensor, largest: bool) -> None:
        """Rows of tensors, or the largest of each."""
        self.sums.parts(rows, largest=largest)

    def look(self) -> bool:
        """Whether a step before this one, as far as it is known by now, went wrong."""
        return bool(self._seen)

    def after(self) -> None:
        """All of a step is enqueued: what is wrong with it, the next one may see."""
        self.sums.note(self._torn)
        self._seen.copy_(self._torn, non_blocking=True)
