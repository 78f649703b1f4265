"""A plan's tensors as parts of larger ones: tables, and the launches that go over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tuning
from .launch import Launch, Spec
from .specs import MAX, SQUARES, Method
from .spread import COLUMNS, adopt, tell
from .table import ROW_CHUNKS, ROW_FIRST, ROW_NUMEL

if TYPE_CHECKING:
    from .plan import Plan
    from .words import Words

# Adds up rows of float64 numbers over the processes, in place, or takes the largest.
Reduce = Callable[[Tensor, bool], None]


class Meeting:
    """In the place of a launch: what goes over processes, on the current stream."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def __call__(self, stream: int | None = None) -> None:
        """Enqueues it."""
        self._run()

    def follow(self, other: Any) -> None:
        """There is nothing compiled to take over."""


@dataclass
class Sums:
    """What finalize reads, a number per tensor in the place of one per chunk."""

    partials: Tensor
    flags: Tensor
    lengths: Tensor
    least: Tensor
    squares: Tensor


class Parts:
    """Numbers of tensors that the plan holds parts of.

    Attributes:
        rows: the table of tensors, as finalize is to see it: of the whole, with a chunk each.
        ranges: where groups begin, in tensors.
        torn: the number of a tensor that took part in some processes only, to be set to 0 by
            whoever was told; and whether this step has one.
    """

    def __init__(self, plan: Plan, rows: list[list[int]], reduce: Reduce) -> None:
        self._plan, self._reduce = plan, reduce
        count, device = max(1, len(plan.slots)), plan.device
        whole = [list(row) for row in rows]
        for t, (row, slot) in enumerate(zip(whole, plan.slots, strict=True)):
            row[ROW_NUMEL.value], row[ROW_FIRST.value], row[ROW_CHUNKS.value] = slot.elements, t, 1
        self.rows = torch.as_tensor(whole, dtype=torch.int64).to(device).reshape(-1)
        bounds = [sum(s.group < g for s in plan.slots) for g in range(plan.groups + 1)]
        self.ranges = torch.as_tensor(bounds, dtype=torch.int32).to(device)
        self.torn = torch.zeros(2, dtype=torch.int64, device=device)
        self._exchanged = torch.zeros(count, COLUMNS.value, dtype=torch.float64, device=device)
        self.norms = self.sums()

    def sums(self) -> Sums:
        """Room for what a pass sums up."""
        count, device = len(self._exchanged), self._exchanged.device

        def numbers(dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        return Sums(numbers(), numbers(torch.int32), numbers(), numbers(), numbers())

    def launches(
        self,
        words: Words,
        into: Sums,
        partials: Tensor,
        is_pass: bool,
        by_rows: tuple[Tensor, Tensor] | None = None,
    ) -> list[Any]:
        """From partial sums of chunks here to the sums of whole tensors.

        `by_rows`: least coefficients of chunks, and squares after these, where rows are clipped.
        """
        plan = self._plan
        kind = SQUARES if is_pass else plan.method.kind
        count = len(plan.slots)
        programs = -(-count // tuning.FINALIZE_ROWS)
        rows = by_rows or (partials, partials)
        told = (plan.rows, words.gradients, partials, plan.flags, *rows, self._exchanged)
        taken = (self.rows, self._exchanged, into.partials, into.flags, into.lengths, plan.go)
        exchanged = self._exchanged[:count]
        spec = tell_spec(kind, is_pass=is_pass, by_rows=by_rows is not None)
        return [
            Launch(spec, programs, (*told, into.least, into.squares, self.torn, count)),
            Meeting(lambda: self._reduce(exchanged, kind == MAX)),
            Launch(adopt_spec(kind, is_pass=is_pass), programs, (*taken, self.torn, count)),
        ]


def tell_spec(kind: int, *, is_pass: bool, by_rows: bool) -> Spec:
    """What leaves numbers for other processes."""
    constants = {
        "KIND": kind,
        "PASS": is_pass,
        "BY_ROWS": by_rows,
        "ROWS": tuning.FINALIZE_ROWS,
        "ROW_SPAN": tuning.FINALIZE_ROW_SPAN,
    }
    return Spec(tell, tuple(constants.items()), tuning.FINALIZE_WARPS)


def adopt_spec(kind: int, *, is_pass: bool) -> Spec:
    """What takes up the numbers of all."""
    constants = {"KIND": kind, "PASS": is_pass, "ROWS": tuning.FINALIZE_ROWS}
    return Spec(adopt, tuple(constants.items()), tuning.FINALIZE_WARPS)


def spreads(method: Method) -> bool:
    """Whether norms are of more than what is here."""
    return method.parts and method.reduces
