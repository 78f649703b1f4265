"""Methods that walk on the clients: clipped local descent, reshuffling, and their rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .._clip_grad import get_total_norm
from .clients import Client, Task, descend, drawn, shuffled
from .method import (
    Method,
    NormSource,
    Outcome,
    State,
    Upload,
    check_count,
    check_positive,
    constant,
    draw_cohort,
    equally,
    move,
    smoothed_step,
)
from .uploads import Uploads


def _check_source(source: str) -> None:
    if source not in ("pseudo", "exact"):
        raise ValueError(f'norm_source must be "pseudo" or "exact"; got {source!r}')


@dataclass(frozen=True)
class _Clipped(Method):
    """x -= g / (c0 + c1 * norm): what the three methods of arXiv:2412.02781 end a round with."""

    lr: float = 1e-3
    c0: float = 1.0
    c1: float = 0.0
    norm_source: NormSource = "pseudo"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        check_positive(self, "c0", "c1", zero=True)
        if self.c0 == self.c1 == 0:
            raise ValueError("c0 or c1 must be greater than 0; got 0 and 0")
        _check_source(self.norm_source)
        check_count("batch_size", self.batch_size)
        check_count("cohort", self.cohort)

    @property
    def parts(self) -> int:
        """The pseudo-gradient, and the gradient at x for its norm if that is asked for."""
        return 2 if self.norm_source == "exact" else 1

    def _answer(self, pseudo: Tensor, client: Client, x: Tensor) -> Upload:
        return (pseudo, client.grad(x, None)) if self.norm_source == "exact" else (pseudo,)

    def _finish(self, x: Tensor, g: Tensor, norm: float, exact: float | None) -> Outcome:
        measured = norm if exact is None else exact
        step = smoothed_step(measured, self.c0, self.c1)
        move(x, g, step)
        return Outcome(norm, step, measured)

    def update(self, state: State, uploads: Uploads) -> Outcome:
        """One clipped step along the mean of what clients sent."""
        exact = uploads.combine(equally(uploads), 1)[1] if self.norm_source == "exact" else None
        g, norm = uploads.combine(equally(uploads))
        state.rounds += 1
        return self._finish(state.x, g, norm, exact)


@dataclass(frozen=True)
class ClipLocalGDJ(_Clipped):
    """Clipped local gradient descent with jumping.

    Equivalent to::

        for m in clients:                             # client m
            y = x.clone()
            for _ in range(local_steps):
                y -= lr * grad_m(y)
            u_m = (x - y) / (lr * local_steps)
        g = mean(u_m)                                 # server
        x -= g / (c0 + c1 * norm)

    lr may be tiny while the server's step is a usual one. `local_steps=1` is (L0,L1)-GD.

    Args:
        lr: clients' step size, greater than 0.
        c0, c1: constants of the server's step; lr and clip threshold c are c0 = 1 / (2 lr) and
            c1 = c0 / c. At least 0, not both 0.
        norm_source: "pseudo": norm = ||g||, as in the paper's experiments; "exact":
            norm = ||grad f(x)||, as in its theory: clients send their gradient at x as well, which
            doubles what is sent. The two need different c0, c1.
        batch_size: samples of each gradient, drawn without replacement; None for all.
        local_steps: of each client, at least 1.
        cohort: clients drawn for each round; None for all.
        seed: of the draws.

    Source: arXiv:2412.02781, algorithm 1.
    """

    local_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("local_steps", self.local_steps)

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """The mean of the gradients on the way."""
        first = task.round * self.local_steps
        batches = drawn(
            *(client, self.batch_size, self.local_steps),
            seed=self.seed,
            first=first,
            who=task.client,
        )
        pseudo, _ = descend(client, received[0], batches, constant(self.lr))
        return self._answer(pseudo, client, received[0])


@dataclass(frozen=True)
class CLERR(_Clipped):
    """Clipped once in an epoch random reshuffling.

    Equivalent to `ClipLocalGDJ` where clients walk over all their samples once, in batches of
    `batch_size`, in a new order each round; the last batch may be smaller, and counts by its size.

    Args:
        lr: clients' step size ("inner step"), greater than 0.
        c0, c1, norm_source, batch_size, cohort, seed: as in `ClipLocalGDJ`.
        shuffle: "every" epoch, or "once": the order of the first epoch is kept.

    Source: arXiv:2412.02781, algorithm 2. c1 = 0 is NASTYA.
    """

    shuffle: Literal["every", "once"] = "every"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle not in ("every", "once"):
            raise ValueError(f'shuffle must be "every" or "once"; got {self.shuffle!r}')

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """The mean of an epoch's gradients."""
        epoch = task.round if self.shuffle == "every" else 0
        batches = shuffled(client, self.batch_size, seed=self.seed, epoch=epoch, who=task.client)
        pseudo, _ = descend(client, received[0], batches, constant(self.lr))
        return self._answer(pseudo, client, received[0])


def nastya(lr: float, server_lr: float, **options: object) -> CLERR:
    """NASTYA: reshuffling with a constant server step; `CLERR` with c0 = 1 / server_lr, c1 = 0.

    Args:
        lr: clients' step size.
        server_lr: greater than 0.
        options: others of `CLERR`.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:2201.11066.
    """
    if not server_lr > 0:
        raise ValueError(f"server_lr must be greater than 0; got {server_lr!r}")
    return CLERR(lr=lr, c0=1.0 / server_lr, c1=0.0, **options)  # type: ignore[arg-type]


@dataclass
class MetaEpochState(State):
    """Besides x: where the cohorts' walk is, and the sum of its pseudo-gradients.

    With "exact" norms also the sum of the clients' gradients at x, and how many they are.
    """

    inner: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    answered: int = 0
    cohorts: int = 0


@dataclass(frozen=True)
class ClippedRRCLI(CLERR):
    """Clipped random reshuffling of clients and of their samples: partial participation.

    Equivalent, over a meta-epoch, in which each client is asked once, to::

        y = x.clone()
        for cohort in split(shuffled(clients)):       # a round each
            g_r = mean(<mean gradient of an epoch of client m that starts from y> for m in cohort)
            y -= server_lr * g_r
        g = mean(g_r)
        x -= g / (c0 + c1 * norm)

    Args:
        lr, c0, c1, norm_source, batch_size, shuffle, seed: as in `CLERR`. With "exact" norms the
            server sends x beside y.
        server_lr: step between cohorts, greater than 0.
        cohort: clients in a round; must divide their number. Required.

    State: `inner` (y), `total` (the sum of g_r), with "exact" norms `gradient`; a vector each.
    Source: arXiv:2412.02781, algorithm 3.
    """

    server_lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "server_lr")
        if self.cohort is None:
            raise ValueError("cohort must be given: the number of clients in a round")

    def start(self, x: Tensor) -> MetaEpochState:
        """At the beginning of a meta-epoch."""
        x = x.detach().clone()
        exact = torch.zeros_like(x) if self.norm_source == "exact" else torch.empty(0)
        return MetaEpochState(x, 0, x.clone(), torch.zeros_like(x), exact)

    def participants(self, state: State, clients: Sequence[int]) -> list[int]:
        """The next cohort of this meta-epoch's shuffle."""
        assert isinstance(state, MetaEpochState)
        size = self.cohort or 0
        if len(clients) % size != 0:
            raise ValueError(f"cohort must divide {len(clients)}, the clients; got {size}")
        rounds = len(clients) // size
        epoch, turn = divmod(state.rounds, rounds)
        state.cohorts = rounds
        order = draw_cohort(clients, len(clients), seed=self.seed, step=epoch)
        return order[turn * size : (turn + 1) * size]

    def sent(self, state: State) -> Upload:
        """Where the walk is; and x, if gradients there are asked for."""
        assert isinstance(state, MetaEpochState)
        return (state.inner, state.x) if self.norm_source == "exact" else (state.inner,)

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """The mean of an epoch's gradients; a client counts its own epochs by rounds."""
        pseudo = super().reply(task, received, client)[0]
        return self._answer(pseudo, client, received[-1])

    def update(self, state: State, uploads: Uploads) -> Outcome:
        """A plain step of the walk, and the clipped one of x at the end of a meta-epoch."""
        assert isinstance(state, MetaEpochState)
        g, norm = uploads.combine(equally(uploads))  # before anything of the state has changed
        if self.norm_source == "exact":
            state.gradient += uploads.combine(dict.fromkeys(uploads.clients, 1.0), 1)[0]
            state.answered += len(uploads)
        state.total += g
        move(state.inner, g, self.server_lr)
        state.rounds += 1
        if state.rounds % state.cohorts != 0:
            return Outcome(norm, self.server_lr, norm)
        g = state.total.div_(state.cohorts)
        norm, exact = float(get_total_norm([g])), None
        if self.norm_source == "exact":
            exact = float(get_total_norm([state.gradient])) / state.answered
            state.gradient.zero_()
            state.answered = 0
        outcome = self._finish(state.x, g, norm, exact)
        state.inner.copy_(state.x)
        state.total.zero_()
        return outcome
