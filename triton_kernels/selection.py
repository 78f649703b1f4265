"""The launches of a selection (sample.py, select.py, rand_k.py), and their tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .how import How
from .launch import Launch, Spec
from .rand_k import rand_k
from .rule import Rule
from .rules import RULES
from .sample import DIGIT_BITS, DIGITS, LINE, SAMPLE, begin_select, sample
from .select import narrow, select_block, selected, settle, ties
from .specs import IN_ALL, IN_BLOCK, TOP_K, Form, Method, pass_how
from .table import CHUNK, LIST, UNIT_WORDS

if TYPE_CHECKING:
    from .plan import Plan, Work
    from .words import Words

LINES = 64  # that a program of sample takes
MOST_BLOCK = 32768  # elements that one program selects from; smaller blocks divide it


def lists(method: Method, numel: int) -> bool:
    """Whether candidates of such a tensor are listed; others are selected from by one program."""
    if method.select is None or method.select[0] != TOP_K:
        return False
    return method.select[1] == IN_ALL or (method.select[1] != IN_BLOCK and numel > CHUNK)


def picked_scale(method: Method, numel: int) -> float:
    """What chosen coordinates of a tensor of this size are multiplied by."""
    if method.select is None or not method.select[5] or numel == 0:
        return 1.0
    _, _, ratio, k, *_ = method.select
    wanted = math.ceil(ratio * numel) if ratio > 0 else int(k)
    return numel / min(max(wanted, 1), numel)


def mix32(x: int) -> int:
    """As in csrc/core/random.h."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


class Stretch(NamedTuple):
    """Sampled lines of one tensor: the first one's number, and where each starts."""

    tensor: int
    first: int
    places: list[int]


def stretches(tensors: Sequence[int], numels: Sequence[int], first: int) -> Iterator[Stretch]:
    """A sample of a unit, by the CPU backend's rule: one line from each of equal parts."""
    total = sum(numels[t] for t in tensors)
    lines = min(max(total // 128, 64), SAMPLE.value // LINE.value) if total > CHUNK // 2 else 0
    owners = iter(tensors)
    tensor, before, found = -1, 0, list[int]()
    end = 0
    for line in range(lines):
        begin, stop = (total // LINE.value * (line + n) // lines for n in (0, 1))
        at = (begin + mix32(line + 1) % max(1, stop - begin)) * LINE.value
        while at >= end:
            if found:
                yield Stretch(tensor, first + line - len(found), found)
            tensor, before, found = next(owners), end, []
            end += numels[tensor]
        found.append(at - before)
    if found:
        yield Stretch(tensor, first + lines - len(found), found)


class Selection:
    """What a plan's steps select, and how."""

    def __init__(self, plan: Plan) -> None:
        method, device = plan.method, plan.device
        assert method.select is not None
        kind, scope, ratio, k, block, scaled, seed = method.select
        self.plan, self.tops, self.scope, self.block = plan, kind == TOP_K, scope, block
        self.everywhere = scope == IN_ALL

        def ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        self._ints = ints
        self.spec = ints([ratio, k, float(scaled), 0.0], torch.float64)
        halves = [n - (n >> 31 << 32) for n in (seed & 0xFFFFFFFF, seed >> 32)]
        self.seeds = ints(halves).view(torch.uint32)
        numels = [s.param.numel() for s in plan.slots]
        listed = [t for t, n in enumerate(numels) if n > 0 and lists(method, n)]
        units = [listed] if self.everywhere else [[t] for t in listed]
        self.members = ints([0] if self.everywhere and listed else listed)
        samples: list[Stretch] = []
        bounds = [0]
        for unit in units if listed else []:
            found = list(stretches(unit, numels, bounds[-1]))
            samples += found
            bounds.append(bounds[-1] + sum(len(s.places) for s in found))
        self.bounds = ints(bounds)
        self.places = ints([at for s in samples for at in s.places] or [0], torch.int64)
        self.samples = ints([-1] * max(1, bounds[-1] * LINE.value), torch.int64)
        chunks = max(1, plan.chunks) if listed else 1
        rows = 1 if self.everywhere else max(1, len(numels))
        key = torch.int64 if plan.wide else torch.int32
        self.units = torch.zeros(rows * UNIT_WORDS.value, dtype=torch.int64, device=device)
        histogram = rows * DIGITS.value if listed else 1
        self.histogram = torch.zeros(histogram, dtype=torch.int64, device=device)
        self.tallies = ints([0, 0], torch.int64)  # selections, and how many looked at all values
        self.counts, self.equals = ints([0] * chunks), ints([0] * chunks)
        room = chunks * LIST.value if listed else 1
        self.list_keys = torch.zeros(room, dtype=key, device=device)
        self.list_places = torch.zeros(room, dtype=torch.int32, device=device)

        self._works: list[tuple[Work, list[dict[str, Spec]], tuple[Tensor, ...]]] = []
        for work, _, _, slot in plan.works:
            rule = RULES[work.rule]
            specs = [
                select_specs(rule, k, slot.hyper, work.form, method) for k in range(len(rule.taken))
            ]
            tables: tuple[Tensor, ...] = ()
            if work.form.listed:
                tables = self._sampled(work, samples)
            elif self.tops:
                size = dict(specs[0]["block"].constants)["HOW"].block
                tables = plan.tiles(work, size)
            self._works.append((work, specs, tables))

    @classmethod
    def of(cls, plan: Plan) -> Selection | None:
        """None where nothing is selected."""
        return None if plan.method.select is None else cls(plan)

    def room(self) -> tuple[Tensor, ...]:
        """Where a pass leaves candidates."""
        return self.units, self.counts, self.list_keys, self.list_places

    # ---- tables ----------------------------------------------------------------------------------

    def _sampled(self, work: Work, samples: Sequence[Stretch]) -> tuple[Tensor, ...]:
        """What programs of sample() take: a tensor, its first line, how many."""
        mine = {t for t, s in enumerate(self.plan.work_of) if s == work}
        items = [
            (s.tensor, s.first + i, min(LINES, len(s.places) - i))
            for s in samples
            if s.tensor in mine
            for i in range(0, len(s.places), LINES)
        ]
        return tuple(self._ints(list(column)) for column in zip(*items, strict=True))

    # ---- launches ------------------------------------------------------------------------------

    def before(self, words: Words, k: int) -> list[Launch]:
        """What comes before pass number k, which evaluates the values: samples, filters."""
        plan, out = self.plan, []
        listed = [work for work in self._works if work[0].form.listed]
        for work, specs, tables in listed:
            if tables:
                tensor = (plan.rows, words.gradients, plan.layouts, *tables, self.places)
                rest = (plan.numbers_of(work.form), plan.keys, plan.go, self.samples)
                out.append(Launch(specs[k]["sample"], len(tables[0]), (*tensor, *rest)))
        if listed:
            given = (plan.rows, words.gradients, words.hypers, self.members, self.bounds)
            own = (self.spec, plan.go, self.samples, self.units, self.histogram)
            spec = begin_spec(RULES[listed[0][0].rule], self.everywhere, plan.wide)
            out.append(Launch(spec, len(self.members), (*given, *own, len(plan.slots))))
        return out

    def after(self, words: Words, k: int) -> list[Launch]:
        """What comes after it: who is chosen, and what becomes of that."""
        plan, out = self.plan, []
        listed = []
        for (work, stages, tables), (_, chunks, *_) in zip(self._works, plan.works, strict=True):
            specs = stages[k]
            numbers = (plan.numbers_of(work.form), plan.keys, plan.go)
            tensors = (plan.rows, words.gradients, plan.layouts, words.hypers)
            given: tuple[Any, ...]
            if work.form.listed:
                listed.append((specs, len(chunks[0]), (*tensors, *chunks, *numbers, *self.room())))
            elif self.tops:
                given = (*tensors, *tables, *numbers, self.spec)
                out.append(Launch(specs["block"], len(tables[0]), given))
            else:
                given = (*tensors, *chunks[:2], *numbers, self.spec, self.seeds)
                out.append(Launch(specs["rand_k"], len(chunks[0]), given))
        if not listed:
            return out
        above = 63 if plan.wide else 31
        while above > 0:
            width = min(DIGIT_BITS, above)
            above -= width
            for specs, programs, tables in listed:
                given = (*tables, self.histogram, above, width)
                out.append(Launch(specs["narrow"], programs, given))
            units = (self.members, self.units, self.histogram, self.tallies, plan.go, above)
            out.append(Launch(SETTLE, len(self.members), units))
        for name in ("ties", "selected"):
            for specs, programs, tables in listed:
                out.append(Launch(specs[name], programs, (*tables, self.equals)))
        return out


SETTLE = Spec(settle, (), 8)


def begin_spec(rule: Rule, everywhere: bool, wide: bool) -> Spec:
    """What begins a selection from lists."""
    constants = {"GLOBAL": everywhere, "FREEZES": rule.freezes, "WIDE": wide, "SPAN": 512}
    return Spec(begin_select, tuple(constants.items()), 16)


def select_specs(
    rule: Rule, k: int, hyper: Sequence[float], form: Form, method: Method
) -> dict[str, Spec]:
    """The kernels that a rule's selection after pass k, from tensors of this form, may take."""
    assert method.select is not None
    _, scope, *_, block, _, _ = method.select
    few = tuning.shape_for(1, strided=True).block  # as many as a list holds
    first = pass_how(rule, k, hyper, form, method.zero)
    first = replace(first, writes=0, collects=False, sum=0, noisy=0, keeps=False)

    def how(streams: Any, **rest: Any) -> How:
        given = {"again": rule.again[k], "wide": form.wide, "block": few, **rest}
        return form.how(rule, rule.taken[k], streams, method.zero, **given)

    freezes = ("FREEZES", rule.freezes)
    looks = (("HOW", how(rule.looks[k], noisy=0)), ("GLOBAL", scope == IN_ALL), freezes)
    takes = (("HOW", how(rule.takes[k])), *looks[1:])
    size = block if scope == IN_BLOCK else CHUNK
    one = how(rule.looks[k], noisy=0, block=size), how(rule.takes[k], block=size)
    warps = min(32, max(4, size // (256 if form.wide else 512)))
    return {
        "sample": Spec(sample, (("LINES", LINES), ("HOW", first)), 4),
        "narrow": Spec(narrow, looks, 4),
        "ties": Spec(ties, looks, 4),
        "selected": Spec(selected, (*takes, ("SPAN", 1024)), 4),
        "block": Spec(select_block, (("LOOKS", one[0]), ("HOW", one[1]), freezes), warps),
        "rand_k": Spec(rand_k, (("HOW", how(rule.takes[k], block=512)), freezes), 4),
    }
