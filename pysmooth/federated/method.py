"""What a federated method is: three functions over parameter vectors, and a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .clients import Client, Task
from .draws import permutation
from .uploads import Uploads

NormSource = Literal["pseudo", "exact"]
Upload = tuple[Tensor, ...]


@dataclass
class State:
    """What the server keeps.

    Args:
        x: the parameters, a vector.
        rounds: how many are finished.
    """

    x: Tensor
    rounds: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything, for torch.save; loads with `weights_only=True`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes the values of `state_dict`.

        Raises:
            ValueError: keys, shapes, dtypes or types are others. Nothing has changed.
        """
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        if missing := sorted(mine.keys() ^ saved.keys()):
            raise ValueError(f"the saved state does not fit: {', '.join(missing)}")
        for name, value in mine.items():
            new = saved[name]
            if isinstance(value, Tensor):
                alike = isinstance(new, Tensor) and (new.shape, new.dtype) == (
                    value.shape,
                    value.dtype,
                )
            else:
                alike = type(new) is type(value)
            if not alike:
                raise ValueError(f"the saved state does not fit: {name}")
        for name, value in mine.items():
            if isinstance(value, Tensor):
                value.copy_(saved[name])
            else:
                setattr(self, name, saved[name])


class Outcome(NamedTuple):
    """What the server did.

    Args:
        norm: of what clients' vectors were summed up to.
        step: what that was multiplied by.
        measured: the norm that the step size came from.
    """

    norm: float
    step: float
    measured: float


@dataclass(frozen=True)
class Method(ABC):
    """Base class: what is sent, what clients answer, what the server makes of it.

    Args:
        cohort: clients drawn for each round, without replacement; None for all.
        seed: of shuffles and cohorts.

    Raises:
        ValueError: an argument is out of range.
    """

    cohort: int | None = None
    seed: int = 0

    @property
    def parts(self) -> int:
        """Vectors in an answer."""
        return 1

    def start(self, x: Tensor) -> State:
        """The state before the first round; `x` is copied."""
        return State(x.detach().clone())

    def participants(self, state: State, clients: Sequence[int]) -> list[int]:
        """Who is asked in the next round."""
        if self.cohort is None:
            return list(clients)
        return draw_cohort(clients, self.cohort, seed=self.seed, step=state.rounds)

    def sent(self, state: State) -> Upload:
        """The vectors that go to every participant."""
        return (state.x,)

    @abstractmethod
    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """What a client answers."""

    @abstractmethod
    def update(self, state: State, uploads: Uploads) -> Outcome:
        """Changes the state; `uploads` holds at least one answer."""


def equally(uploads: Uploads) -> dict[int, float]:
    """Factors of a mean."""
    return dict.fromkeys(uploads.clients, 1.0 / len(uploads))


def draw_cohort(clients: Sequence[int], size: int, *, seed: int, step: int) -> list[int]:
    """So many of the clients, without replacement: by seed and step alone."""
    if not 0 < size <= len(clients):
        raise ValueError(f"cohort must be from 1 to {len(clients)}, the clients; got {size}")
    places = permutation(size, len(clients), seed=seed, step=step, tensor_id=_SERVER)
    return [clients[i] for i in places.tolist()]


def move(x: Tensor, direction: Tensor, step: float) -> None:
    """X -= step * direction, in place; `direction` is overwritten."""
    x.sub_(direction.mul_(step))


def smoothed_step(norm: float, c0: float, c1: float) -> float:
    """1 / (c0 + c1 * norm), and 0 where that is infinite."""
    curvature = c0 + c1 * norm
    return 1.0 / curvature if curvature > 0 else 0.0


def constant(lr: float) -> Callable[[Tensor], float]:
    """A step size that does not look at the gradient."""
    return lambda _: lr


def check_positive(method: Method, *names: str, zero: bool = False) -> None:
    """Refuses what is not a finite number greater than 0 (or 0 as well), naming the argument."""
    for name in names:
        value = getattr(method, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not (ok and (value >= 0 if zero else value > 0) and value < float("inf")):
            bound = "at least 0" if zero else "greater than 0"
            raise ValueError(f"{name} must be a number, {bound} and finite; got {value!r}")


def check_count(name: str, value: object) -> None:
    """Refuses what is not an integer of at least 1, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")


_SERVER = (1 << 31) - 1  # the number under which the server draws; clients' numbers are less
