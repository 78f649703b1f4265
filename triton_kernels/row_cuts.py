"""The launches of a clip by rows (rows.py), and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .launch import Launch
from .specs import coefs_spec, rows_spec
from .table import (
    CHUNK,
    ROW_COEFS,
    ROW_GRAD_ROWS,
    ROW_LENGTH,
    ROW_PARAM_ROWS,
    ROW_ROWS,
    ROW_RUN,
    walk_order,
)

if TYPE_CHECKING:
    from .launch import Spec
    from .plan import Plan, Slot
    from .words import Words


class Rows:
    """What is cut into rows, and where the sums and coefficients of these are."""

    def __init__(self, plan: Plan, table: list[list[int]]) -> None:
        self._plan = plan
        device = plan.device
        cut = [t for t, s in enumerate(plan.slots) if s.rows > 0]
        lengths = {t: plan.slots[t].param.numel() // plan.slots[t].rows for t in cut}
        parts: list[int] = []  # per chunk: where the sums of its rows begin
        room = 0
        for t, s in enumerate(plan.slots):
            for begin in range(0, s.param.numel(), CHUNK):
                parts.append(room)
                if t in lengths:
                    last = min(begin + CHUNK, s.param.numel()) - 1
                    room += last // lengths[t] - begin // lengths[t] + 1

        def floats(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._parts = torch.tensor(parts or [0], dtype=torch.int64).to(device)
        self._sums = floats(room), floats(room)  # of the parameter's rows, the gradient's
        chunks = max(1, plan.chunks)
        self.smallest, self.squares = floats(chunks), floats(chunks)
        counts = [plan.slots[t].rows for t in cut]
        self._coefs = {
            t: floats(n, _compute(plan.slots[t])) for t, n in zip(cut, counts, strict=True)
        }
        sums_of: dict[tuple[int, Spec], list[int]] = {}
        coefs_of: dict[Spec, list[int]] = {}
        for t in cut:
            s, row = plan.slots[t], table[t]
            row[ROW_ROWS.value], row[ROW_LENGTH.value] = s.rows, lengths[t]
            row[ROW_RUN.value] = _run(s, lengths[t])
            row[ROW_COEFS.value] = self._coefs[t].data_ptr()
            for place, (word, tensor) in enumerate(
                ((ROW_PARAM_ROWS, s.param), (ROW_GRAD_ROWS, s.grad))
            ):
                dims, at = plan.lay_out(s.param.shape, [tensor], rows_first=s.rows > 1)
                row[word.value] = at
                spec = rows_spec(tensor.dtype, dims, lengths[t], of_grad=place == 1)
                sums_of.setdefault((place, spec), []).append(t)
            coefs_of.setdefault(coefs_spec(s.param.dtype), []).append(t)

        self._sums_of = [(*key, plan.chunks_of(members)) for key, members in sums_of.items()]
        self._coefs_of = [(spec, plan.chunks_of(members)) for spec, members in coefs_of.items()]

    @classmethod
    def of(cls, plan: Plan, table: list[list[int]]) -> Rows | None:
        """None where nothing is clipped by rows. Writes its words into the table of tensors."""
        return cls(plan, table) if any(s.rows for s in plan.slots) else None

    def launches(self, words: Words) -> list[Launch]:
        """What comes before finalize."""
        plan, out = self._plan, []
        for place, spec, chunks in self._sums_of:
            given = (plan.rows, words.gradients, plan.layouts, *chunks, self._parts)
            out.append(Launch(spec, len(chunks[0]), (*given, self._sums[place])))
        for spec, chunks in self._coefs_of:
            given = (plan.rows, words.gradients, words.hypers, words.amp, *chunks, self._parts)
            made = (*self._sums, self.smallest, self.squares)
            out.append(Launch(spec, len(chunks[0]), (*given, *made)))
        return out


def _compute(s: Slot) -> torch.dtype:
    return torch.float64 if s.param.dtype == torch.float64 else torch.float32


def _run(s: Slot, length: int) -> int:
    """So many elements of a row are walked one after another."""
    strides: Sequence[Sequence[int]] = [t.stride() for t in s.operands]
    order = walk_order(s.param.shape, strides)
    if s.rows == 1 or 0 not in order:
        return length
    return prod(s.param.shape[d] for d in order[order.index(0) + 1 :])
