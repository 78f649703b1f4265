"""A plan: the tables of one list of tensors, and the launches of a step over them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .absorption import Absorption
from .block_scales import block_scales
from .finalize import finish_pass
from .how import STOCHASTIC
from .launch import Launch, Spec, captures, current_stream, is_late
from .operands import CONSTANTS
from .parts import Parts, Reduce, spreads
from .row_cuts import Rows
from .rule import KNOWN
from .rules import RULES
from .selection import Selection, lists, picked_scale
from .specs import Form, Method, apply_spec, finalize_spec, look_spec, pass_specs, reduce_spec
from .table import (
    BLOCK_NUMBERS,
    CHUNK,
    KEY_WORDS,
    MAX_DIMS,
    ROW_BLOCKS,
    ROW_COUNTED,
    ROW_WORDS,
    Dimension,
    cut,
    is_linear,
    merge_layout,
)
from .tuning import INTERPRETED
from .words import NO_AMP, Words


@dataclass
class Slot:
    """One parameter, real (complex ones as pairs of numbers), with what belongs to it.

    `grad` has the form that its gradients are expected to have: dtype, strides, alignment.
    """

    rule: str
    group: int
    param: Tensor
    grad: Tensor
    states: list[Tensor]
    steps: Tensor | None = None
    norm_sq: Tensor | None = None
    scale: Tensor | None = None
    companion: Tensor | None = None  # what goes with a parameter that is kept in two tensors
    kept: int = 0  # how it is kept, as in csrc/core/param_storage.h
    low: int = 0  # states in bfloat16, as bits
    starts: int = 0  # states that start as the gradient, as bits
    fresh: int = 0  # 1: this is its first step; 2: some of what it has is new; see finalize.py
    rows: int = 0  # that it is clipped by; 0: it is clipped as a whole
    absorbed: int = 0  # gradients that its states have taken in since the last step
    hyper: Sequence[float] = ()
    elements: int = 0  # of the whole tensor, where this is a part of one
    counted: bool = False  # where it is an empty one: it takes part in steps

    @property
    def operands(self) -> list[Tensor]:
        """In the order that kernels number them."""
        held = [] if self.companion is None else [self.companion]
        return [self.param, self.grad, *self.states, *held]


class Work(NamedTuple):
    """What a slot goes through: slots that go through the same share their launches."""

    rule: str
    form: Form
    apply: Spec | None
    finalize: Spec
    passes: tuple[tuple[Spec | None, Spec | None], ...]  # and what makes constants of their sums


Bound = tuple[list[Any], list[Any]]  # launches up to the constants, and from there on
SPARES = 4  # captures that a step prepares for


class Plan:
    """The tables, and the launches bound to them."""

    def __init__(
        self,
        slots: Sequence[Slot],
        groups: int,
        method: Method,
        device: torch.device,
        reduce: Reduce | None = None,
    ):
        """`reduce`: adds up over the processes that hold parts of the same tensors."""
        self.slots, self.method, self.device = list(slots), method, device
        self.groups = groups
        numels = [s.param.numel() for s in slots]
        first = cut(numels)
        self.chunks = first[-1]
        self._layouts: list[int] = [0]
        # Magnitudes are compared as float64 if one of them is.
        self.wide = any(s.param.dtype == torch.float64 for s in slots)
        passes = [self._work_of(s) for s in slots]
        reads = [self._read_of(s) for s in slots]
        counts = torch.tensor([b - a for a, b in pairwise(first)], dtype=torch.int64)
        # Of every chunk: its tensor, and which of its chunks it is.
        owner = torch.repeat_interleave(torch.arange(len(slots)), counts) if slots else counts
        self._cut = owner, torch.arange(self.chunks) - torch.tensor(first[:-1] or [0])[owner]
        self._tiles: dict[tuple[Work, int], tuple[Tensor, ...]] = {}

        def ints(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        self._ints = ints
        # What each block scales by, in what is computed in: there are as many of each chunk.
        per_chunk = BLOCK_NUMBERS.value * max(1, CHUNK // (method.span or CHUNK))
        self._blocks = {
            c: torch.zeros(self.chunks * per_chunk, dtype=c, device=device)
            for c in {_compute(s) for s in slots if method.span}
        }
        rows = []
        for i, s in enumerate(slots):
            row = self._row(s, first[i], first[i + 1] - first[i], passes[i][1], reads[i][1])
            if method.span:
                row[ROW_BLOCKS.value] = self._blocks[_compute(s)][first[i] * per_chunk :].data_ptr()
            rows.append(row)
        self.rows_of = Rows.of(self, rows)

        def floats(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        count = max(1, len(slots))
        self.rows = ints(rows).reshape(-1)
        self.layouts = ints(self._layouts)
        bounds = [0] * (groups + 1)
        for s, b in zip(slots, first[1:], strict=True):
            bounds[s.group + 1] = b
        for g in range(groups):  # a group without tensors ends where it starts
            bounds[g + 1] = max(bounds[g + 1], bounds[g])
        self.ranges = ints(bounds, torch.int32)
        self.partials = floats(max(1, self.chunks))
        self.flags = ints([0] * max(1, self.chunks), torch.int32)
        units = (1, max(1, groups), count)[method.scope]
        self.norms, self.coefs = floats(units), floats(count)
        self.known = floats(count * KNOWN.value)
        self.fresh = ints([s.fresh for s in slots] or [0], torch.int32)
        self.keys = ints([0] * KEY_WORDS.value * count, torch.int32).view(torch.uint32)
        self.go = ints([1, 0], torch.int32)
        self.parts = None if reduce is None else Parts(self, rows, reduce)
        self.counters = ints([0, 0])
        self.spoiled = ints([0] * count, torch.int32)
        self._numbers = {
            c: torch.zeros(count * CONSTANTS.value, dtype=c, device=device)
            for c in {_compute(s) for s in slots}
        }
        self.looks = [spec if method.absorbs else None for spec, _ in reads]
        reduces = [None if method.absorbs else spec for spec, _ in reads]
        self._reduces = [(spec, self.chunks_of(m)) for spec, m in _grouped(reduces)]
        self.work_of = [work for work, _ in passes]
        self.works = [
            (work, self.chunks_of(m), ints(m, torch.int32), slots[m[0]])
            for work, m in _grouped(p[0] for p in passes)
        ]
        most = max((len(work.passes) for work, *_ in self.works), default=0)
        self._passes = [
            (floats(max(1, self.chunks)), floats(max(1, self.chunks))) for _ in range(most)
        ]
        self.selection = Selection.of(self)
        self.absorption = Absorption(self) if method.absorbs else None
        self.words = Words(len(slots), groups, device)
        self._eager = self._bind(self.words)
        # For captures to come, and of those that were: memory cannot be had while one goes on.
        self._spares: list[tuple[Words, Bound]] = []
        self._captured: list[Words] = []

    # ---- what is specialised for what ----------------------------------------------------------

    def lay_out(
        self, shape: Sequence[int], tensors: Sequence[Tensor], *, rows_first: bool = False
    ) -> tuple[int, int]:
        """How many dimensions there are to walk, and where the layout is; (0, 0) if linear."""
        layout = merge_layout(shape, [t.stride() for t in tensors], rows_first=rows_first)
        if is_linear(layout):
            return 0, 0
        if len(layout) > MAX_DIMS:
            raise ValueError(f"more than {MAX_DIMS} dimensions that cannot be merged")
        dims = next(n for n in (1, 2, 4, 8, MAX_DIMS) if n >= len(layout))  # few specialisations
        at = len(self._layouts)
        still: Dimension = (1, *(0 for _ in tensors))
        for dim in [*layout, *[still] * (dims - len(layout))]:
            self._layouts += dim
        return dims, at

    def _read_of(self, s: Slot) -> tuple[Spec | None, int]:
        """What reads its gradient before anything else, and where the layout of that is."""
        method = self.method
        if s.param.numel() == 0 or not (method.asks if method.absorbs else method.reduces):
            return None, 0
        dims, at = self.lay_out(s.grad.shape, [s.grad])
        aligned = not dims and _aligned(s.grad)
        if method.absorbs:
            return look_spec(s.grad.dtype, dims, aligned), at
        return reduce_spec(s.grad.dtype, method, dims, aligned), at

    def _work_of(self, s: Slot) -> tuple[Work, int]:
        dims, at = self.lay_out(s.param.shape, s.operands)
        rule, method = RULES[s.rule], self.method
        form = Form(
            tuple(t.dtype for t in s.operands),
            dims,
            aligned=not dims and all(_aligned(t) for t in s.operands),
            low=s.low,
            kept=s.kept,
            starts=s.starts,
            wide=self.wide and method.select is not None,
            listed=lists(method, s.param.numel()),
            span=method.span,
            rows=s.rows > 0,
            absorbed=method.absorbs,
        )
        noisy = bool(s.low) or s.kept == STOCHASTIC.value
        draws = rule.draws(s.hyper) != 0
        work = Work(
            s.rule,
            form,
            apply_spec(rule, form, method.zero, s.hyper),
            finalize_spec(rule, method, noisy=noisy, seeded=draws),
            tuple(pass_specs(rule, k, s.hyper, form, method) for k in range(len(rule.sources))),
        )
        return work, at

    def _row(self, s: Slot, first: int, chunks: int, layout: int, grad_layout: int) -> list[int]:
        states = [t.data_ptr() for t in s.operands[2:]]
        states += [0] * (4 - len(states))
        numbers = [0 if t is None else t.data_ptr() for t in (s.steps, s.norm_sq, s.scale)]
        row = [s.param.numel(), s.param.data_ptr(), 0, *states, *numbers]
        picked = array("d", [picked_scale(self.method, s.param.numel())]).tobytes()
        row += [s.group, first, chunks, layout, grad_layout, *array("q", picked)]
        row += [0] * (ROW_WORDS.value - len(row))
        row[ROW_COUNTED.value] = int(s.counted)
        return row

    def tiles(self, work: Work, size: int) -> tuple[Tensor, ...]:
        """What programs that take `size` elements of a tensor take: it, and which."""
        if (work, size) in self._tiles:
            return self._tiles[work, size]
        counts = [
            (t, -(-s.param.numel() // size))
            for t, s in enumerate(self.slots)
            if self.work_of[t] == work
        ]
        owner = [t for t, n in counts for _ in range(n)]
        index = [i for _, n in counts for i in range(n)]
        made = self._ints(owner, torch.int32), self._ints(index, torch.int32)
        self._tiles[work, size] = made
        return made

    def chunks_of(self, members: list[int]) -> tuple[Tensor, ...]:
        """The chunks of these tensors: tensor, place there, number."""
        owner, index = self._cut
        chosen = torch.zeros(len(self.slots), dtype=torch.bool)
        chosen[members] = True
        which = chosen[owner].nonzero().flatten()
        return tuple(self._ints(x, torch.int32) for x in (owner[which], index[which], which))

    def numbers_of(self, form: Form) -> Tensor:
        """The constants of tensors of a form, in what is computed in."""
        wide = form.dtypes[0] == torch.float64
        return self._numbers[torch.float64 if wide else torch.float32]

    # ---- the step ------------------------------------------------------------------------------

    def _bind(self, words: Words) -> Bound:
        """The launches of a step that reads these words: up to the constants, and from there on."""
        norms: list[Any] = []
        applies: list[Any] = []
        if self.absorption is not None:
            norms.append(self.absorption.begin(words))
        for spec, (owner, index, number) in self._reduces:
            chunks = (self.rows, words.gradients, self.layouts, owner, index, number)
            norms.append(Launch(spec, len(owner), (*chunks, self.partials, self.flags)))
        rows, gradients, hypers = self.rows, words.gradients, words.hypers
        least, squares = self.partials, self.partials
        if self.rows_of is not None:
            norms += self.rows_of.launches(words)
            least, squares = self.rows_of.smallest, self.rows_of.squares
        # What finalize sees: tensors by their chunks, or as what all processes have of them.
        tables, ranges, pieces = rows, self.ranges, self.chunks
        partials, flags, torn = self.partials, self.flags, self.go
        if self.parts is not None:
            tables, ranges, pieces = self.parts.rows, self.parts.ranges, len(self.slots)
            into, torn = self.parts.norms, self.parts.torn
            partials, flags = into.partials, into.flags
            by_rows = None if self.rows_of is None else (least, squares)
            if spreads(self.method):
                norms += self.parts.launches(words, into, self.partials, False, by_rows)
            least, squares = into.least, into.squares
        for n, (work, _, members, _) in enumerate(self.works):
            launch = Launch(
                work.finalize.having(COUNTS=n == 0),  # one of them counts skipped steps
                -(-len(members) // tuning.FINALIZE_ROWS),
                (
                    *(tables, gradients, hypers, words.amp, partials, flags, ranges),
                    *(members, self.fresh, self.norms, self.coefs, self.known),
                    *(self.numbers_of(work.form), self.keys, self.go, self.counters),
                    *(self.spoiled, least, squares, torn, len(members), pieces, self.groups),
                ),
            )
            norms.append(launch)
        for k, (sums, lengths) in enumerate(self._passes):
            mine = [w for w in self.works if k < len(w[0].passes)]
            chooses = any(k < len(RULES[w[0].rule].taken) for w in mine)
            selection = self.selection if chooses else None
            if selection is not None:
                applies += selection.before(words, k)
            for work, (owner, index, number), *_ in mine:
                if (run := work.passes[k][0]) is None:
                    continue
                chunks = (rows, gradients, self.layouts, owner, index, number)
                own = (self.numbers_of(work.form), self.keys, self.go, sums, lengths)
                room = (self.flags,) * 4 if selection is None else selection.room()
                applies.append(Launch(run, len(owner), (*chunks, *own, *room)))
            if selection is not None:
                applies += selection.after(words, k)
            finishes = [w[0].passes[k][1] for w in mine]
            if self.parts is not None and any(f and f.kernel is finish_pass for f in finishes):
                into = self.parts.sums()
                applies += self.parts.launches(words, into, sums, True)
                sums, lengths = into.partials, into.lengths
            for work, _, members, _ in mine:
                finish = work.passes[k][1]
                if finish is not None and finish.kernel is block_scales:
                    how = dict(finish.constants)["HOW"]
                    tiles = self.tiles(work, max(how.span, how.block))
                    made = (*tiles, self.numbers_of(work.form), self.keys, self.go)
                    given = (rows, gradients, self.layouts, *made)
                    applies.append(Launch(finish, len(tiles[0]), given))
                elif finish is not None:
                    launch = Launch(
                        finish,
                        -(-len(members) // tuning.FINALIZE_ROWS),
                        (
                            *(tables, gradients, hypers, sums, lengths, ranges, members),
                            *(self.known, self.numbers_of(work.form), self.go),
                            *(len(members), pieces),
                        ),
                    )
                    applies.append(launch)
        for work, (owner, index, _), *_ in self.works:
            if work.apply is None:
                continue
            own = (owner, index, self.numbers_of(work.form), self.keys, self.go)
            applies.append(Launch(work.apply, len(owner), (rows, gradients, self.layouts, *own)))
        return norms, applies

    def run(
        self,
        gradients: bytes,
        hypers: bytes,
        amp: bytes = NO_AMP,
        *,
        held: Sequence[tuple[int, Tensor]] = (),
        passes: Sequence[int] = (0, 1),
    ) -> bool:
        """One step, with these addresses and numbers. Returns whether it is captured in a graph.

        Args:
            gradients: an address per slot, as `packed` makes them; 0: it sits out the step.
            hypers: a row per group, as `group_words` makes it.
            amp: addresses of the loss scale and of its overflow flag, packed; 0: none.
            held: places in `hypers` whose numbers are on the device, and these.
            passes: 0: norms and constants; 1: the update.
        """
        words, launches = self.words, self._eager
        captured = captures(self.device)
        if captured:
            words, launches = self._for_capture()
        words.send(gradients, hypers, amp)
        for place, number in held:
            words.hypers[place].copy_(number.reshape(()), non_blocking=True)
        stream = None if INTERPRETED else current_stream(self.device)
        for part in passes:
            for launch in launches[part]:
                launch(stream)
        if is_late(self.device) and words is self.words:
            while len(self._spares) < SPARES:
                spare = Words(len(self.slots), self.groups, self.device, owned=True)
                self._spares.append((spare, self._bind(spare)))
        return captured

    def _for_capture(self) -> tuple[Words, Bound]:
        """Tables that a graph will own, and launches that read them."""
        if not self._spares:
            raise RuntimeError(
                f"the triton backend has tables for {SPARES} captures, and all are taken; run the "
                "same step once outside of a capture"
            )
        words, launches = self._spares.pop()
        for mine, known in zip(launches, self._eager, strict=True):
            for launch, other in zip(mine, known, strict=True):
                launch.follow(other)
        self._captured.append(words)
        return words, launches


def _grouped(specs: Iterable[Any]) -> list[tuple[Any, list[int]]]:
    """Who shares a launch: the numbers of the slots of each spec."""
    found: dict[Any, list[int]] = {}
    for i, spec in enumerate(specs):
        if spec is not None:
            found.setdefault(spec, []).append(i)
    return list(found.items())


def _compute(s: Slot) -> torch.dtype:
    return torch.float64 if s.param.dtype == torch.float64 else torch.float32


def _aligned(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0
