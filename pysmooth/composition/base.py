"""What parts are, and how a chain of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .. import reference
from ..compressors import Compressor
from ..reference import Member, Passes

ScopeName = Literal["global", "group", "tensor"]
Start = Literal["zero", "first"]


@dataclass
class Run:
    """One step, as the parts see it.

    Attributes:
        members: the parameters that have a gradient, with all that belongs to them.
        states: the states of the part that runs, by key, per member.
        in_steps: whether u already is what to subtract, the learning rate included.
        shrink: per member, by how much of itself decoupled decay makes it smaller.
    """

    members: Sequence[Member]
    states: list[dict[str, Tensor]] = field(default_factory=list)
    in_steps: bool = False
    shrink: list[float] = field(default_factory=list)

    def lr(self, i: int) -> float:
        """The learning rate of a member."""
        return self.members[i].hyper["lr"]

    def units(self, scope: str) -> list[list[int]]:
        """The members that a norm is taken over together."""
        found: dict[int, list[int]] = {}
        for i, m in enumerate(self.members):
            found.setdefault({"global": 0, "group": m.group}.get(scope, m.number), []).append(i)
        return list(found.values())

    def compress(self, compressor: Compressor, of: list[int], values: list[Tensor]) -> list[Tensor]:
        """C of the values of some members."""
        return Passes([], compressor).compress([self.members[i] for i in of], values)


@dataclass(frozen=True)
class Part:
    """The base class of all parts.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    def state_keys(self) -> tuple[str, ...]:
        """Keys of its states in `optimizer.state[p]`, as the named optimizers have them."""
        return ()

    def init(self) -> tuple[float | str, ...]:
        """What they are filled with."""
        return ()

    def counts_steps(self) -> bool:
        """Whether it depends on how many steps there were."""
        return False

    def remembers(self) -> bool:
        """Whether it keeps a residual or an estimate, which must not take in what is not finite."""
        return False

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """The new updates, of all members; states change in place."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chain:
    """Parts in the order in which they run.

    Args:
        parts: of `pysmooth.composition.parts`.
    """

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return " -> ".join(type(part).__name__ for part in self.parts) or "(nothing)"

    def keys(self) -> list[dict[str, str]]:
        """Per part, its states' keys, by what it calls them: a second "x" is "second_x"."""
        taken: set[str] = set()
        out = []
        for part in self.parts:
            named = {}
            for key in part.state_keys():
                tries = (key, *(f"{n}_{key}" for n in ("second", "third", "fourth", "fifth")))
                name = next((n for n in tries if n not in taken), None)
                if name is None:
                    raise ValueError(f"a chain has room for five states {key!r}")
                named[key] = name
                taken.add(name)
            out.append(named)
        return out

    def run(self, members: Sequence[Member]) -> list[Tensor]:
        """The new parameters; changes the members' states, which lie in the order of the keys."""
        run = Run(members, shrink=[0.0] * len(members))
        us, at = [m.g for m in members], 0
        for part, keys in zip(self.parts, self.keys(), strict=True):
            if run.in_steps:
                us = [u / run.lr(i) if run.lr(i) else u for i, u in enumerate(us)]
                run.in_steps = False
            run.states = [dict(zip(keys, m.states[at:], strict=False)) for m in members]
            at += len(keys)
            us = part.run(us, run)
        steps = us if run.in_steps else [run.lr(i) * u for i, u in enumerate(us)]
        every = zip(members, run.shrink, steps, strict=True)
        return [m.p * (1 - shrink) - step for m, shrink, step in every]


def chain(*parts: Part) -> Chain:
    """Parts in the order in which they run, for `pysmooth.compose`.

    Args:
        parts: any number, of `pysmooth.composition.parts`.

    Raises:
        TypeError: something is not a part.
    """
    for i, part in enumerate(parts):
        if not isinstance(part, Part):
            raise TypeError(f"part {i + 1} must be one of pysmooth.parts; got {part!r}")
    out = Chain(tuple(parts))
    out.keys()
    return out


def norms(us: list[Tensor], run: Run, scope: str, norm_type: float = 2.0) -> list[Tensor]:
    """Of every member, the norm over its unit."""
    out = list(us)
    for unit in run.units(scope):
        norm = reference.total_norm([us[i] for i in unit], norm_type)
        for i in unit:
            out[i] = norm.to(us[i].device)
    return out
