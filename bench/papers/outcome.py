"""What an experiment is, what it is given and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")
Basis = Literal["paper", "recalled", "derived"]


def _ignore(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Config:
    """What the command line asks for.

    Args:
        seeds: how many runs; None: as many as the experiment thinks right.
        quick: a few seconds, for tests.
        data: a folder with data sets in libsvm's format.
        tell: is told how far a loop is: its name, steps done, steps in all.
    """

    seeds: int | None = None
    quick: bool = False
    data: Path | None = None
    tell: Callable[[str, int, int], None] = _ignore

    def of(self, full: Value, quick: Value) -> Value:
        """One of two values."""
        return quick if self.quick else full

    def runs(self, full: int, quick: int) -> int:
        """How many runs."""
        return self.of(full, quick) if self.seeds is None else self.seeds

    def generator(self, number: int = 0) -> torch.Generator:
        """Random numbers; other ones for each number."""
        return torch.Generator().manual_seed(1000 + number)

    def steps(self, count: int, what: str) -> Iterator[int]:
        """`range(count)`, and somebody is told."""
        every = max(1, count // 100)
        for k in range(count):
            if k % every == 0:
                self.tell(what, k, count)
            yield k


@dataclass(frozen=True)
class Curve:
    """Values of all runs (runs, points) at some places; drawn as the median and a 10-90 % band."""

    label: str
    x: list[float]
    values: Tensor

    def last(self) -> Tensor:
        """Of every run, the last value."""
        return self.values[:, -1]

    def at(self, x: float) -> Tensor:
        """Of every run, the value at the last place not after x."""
        return self.values[:, max(i for i, place in enumerate(self.x) if place <= x)]

    def quantiles(self) -> list[list[float]]:
        """The 10 %, 50 % and 90 % quantiles at every place; what is not finite counts as large."""
        ordered = self.values.double().nan_to_num(nan=math.inf, posinf=math.inf).sort(dim=0).values
        places = [round(q * (len(ordered) - 1)) for q in (0.1, 0.5, 0.9)]
        return [[float(v) for v in ordered[place]] for place in places]


@dataclass(frozen=True)
class Panel:
    """One picture of the figure."""

    title: str
    xlabel: str
    ylabel: str
    curves: list[Curve]
    xlog: bool = False
    ylog: bool = True


@dataclass(frozen=True)
class Check:
    """A claim, and what was measured.

    Args:
        claim: what is said.
        measured: what came out.
        expected: what should have.
        holds: whether it did.
        basis: where the claim comes from.
        why: the reason, where it is known that it does not hold.
    """

    claim: str
    measured: str
    expected: str
    holds: bool
    basis: Basis = "paper"
    why: str = ""

    @classmethod
    def below(
        cls, claim: str, value: float, bound: float, *, basis: Basis = "paper", why: str = ""
    ) -> Check:
        """Holds if value < bound; not for NaN."""
        return cls(claim, number(value), f"< {number(bound)}", value < bound, basis, why)

    @classmethod
    def above(
        cls, claim: str, value: float, bound: float, *, basis: Basis = "paper", why: str = ""
    ) -> Check:
        """Holds if value > bound; not for NaN."""
        return cls(claim, number(value), f"> {number(bound)}", value > bound, basis, why)

    @classmethod
    def near(
        cls,
        claim: str,
        value: float,
        want: float,
        rel: float,
        *,
        basis: Basis = "paper",
        why: str = "",
    ) -> Check:
        """Holds if |value - want| <= rel * |want|; not for NaN."""
        expected = f"{number(want)} to {100 * rel:g} %"
        return cls(claim, number(value), expected, abs(value - want) <= rel * abs(want), basis, why)

    def line(self) -> str:
        """The verdict."""
        verdict = "holds" if self.holds else "does not hold"
        reason = f" ({self.why})" if self.why and not self.holds else ""
        return (
            f"{self.claim}: measured {self.measured}, expected {self.expected}: {verdict}{reason}"
        )


@dataclass(frozen=True)
class Outcome:
    """A figure and verdicts; `notes` says what a reader of both should know."""

    panels: list[Panel]
    checks: list[Check]
    notes: str = ""


@dataclass(frozen=True)
class Experiment:
    """One file of `experiments/`.

    Args:
        id: as the command line has it.
        title: a line.
        papers: arXiv ids.
        setting: what is run.
        run: runs it.
    """

    id: str
    title: str
    papers: tuple[str, ...]
    setting: str
    run: Callable[[Config], Outcome] = field(repr=False)


def number(value: float) -> str:
    """Three digits; whole numbers as they are."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"
