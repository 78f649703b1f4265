"""Methods that average what clients moved: FedAvg, CE-FedAvg, CELGC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .._clip_grad import get_total_norm
from .clients import Client, Task, descend, drawn
from .method import (
    Method,
    Outcome,
    State,
    Upload,
    check_count,
    check_positive,
    constant,
    equally,
    move,
    smoothed_step,
)
from .uploads import Uploads


@dataclass(frozen=True)
class _Averaging(Method):
    local_steps: int = 1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("local_steps", "batch_size", "cohort"):
            check_count(name, getattr(self, name))

    def _moved(
        self, task: Task, x: Tensor, client: Client, size: Callable[[Tensor], float]
    ) -> Tensor:
        first = task.round * self.local_steps
        batches = drawn(
            *(client, self.batch_size, self.local_steps),
            seed=self.seed,
            first=first,
            who=task.client,
        )
        return descend(client, x, batches, size)[1]

    def factors(self, uploads: Uploads) -> dict[int, float]:
        """What each client's vector is multiplied by in the sum."""
        return equally(uploads)

    @property
    def step(self) -> float:
        """What the sum is multiplied by."""
        return 1.0

    def update(self, state: State, uploads: Uploads) -> Outcome:
        """A step along the sum."""
        g, norm = uploads.combine(self.factors(uploads))
        move(state.x, g, self.step)
        state.rounds += 1
        return Outcome(norm, self.step, norm)


@dataclass(frozen=True)
class FedAvg(_Averaging):
    """Federated averaging.

    Equivalent to::

        for m in clients:
            y = x.clone()
            for _ in range(local_steps):
                y -= lr * grad_m(y)
            u_m = x - y
        x -= server_lr * sum(n_m * u_m) / sum(n_m)    # n_m: samples of client m

    Args:
        lr: clients' step size, greater than 0.
        server_lr: 1 is the mean of the clients' parameters.
        local_steps, batch_size, cohort, seed: as in `ClipLocalGDJ`.
        by_samples: weigh clients by their samples (n_m); otherwise all alike.

    Source: arXiv:1602.05629.
    """

    lr: float = 1e-2
    server_lr: float = 1.0
    by_samples: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "lr", "server_lr")

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """How far the client went."""
        return (self._moved(task, received[0], client, constant(self.lr)),)

    @property
    def step(self) -> float:
        """The server's step size."""
        return self.server_lr

    def factors(self, uploads: Uploads) -> dict[int, float]:
        """By samples, or all alike."""
        if not self.by_samples:
            return equally(uploads)
        total = sum(uploads.samples.values())
        return {c: n / total for c, n in uploads.samples.items()}


@dataclass(frozen=True)
class CELGC(_Averaging):
    """Communication-efficient local gradient clipping: every local step is clipped.

    Equivalent to `FedAvg(by_samples=False)` where clients step by
    `y -= g / (c0 + c1 * ||g||)`.

    Args:
        c0, c1: at least 0, not both 0.
        local_steps, batch_size, cohort, seed: as in `ClipLocalGDJ`.

    Source: arXiv:2205.05040, with the smoothed clip.
    """

    c0: float = 1.0
    c1: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "c0", "c1", zero=True)
        if self.c0 == self.c1 == 0:
            raise ValueError("c0 or c1 must be greater than 0; got 0 and 0")

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """How far the client went."""

        def size(g: Tensor) -> float:
            return smoothed_step(float(get_total_norm([g])), self.c0, self.c1)

        return (self._moved(task, received[0], client, size),)


@dataclass(frozen=True)
class CEFedAvg(_Averaging):
    """Clipping-enabled FedAvg: what each client moved is clipped.

    Equivalent to::

        u_m = (x - y_m) / local_steps                 # y_m as in FedAvg
        x -= server_lr * mean(u_m * min(1, clip / ||u_m||))

    Args:
        lr, server_lr, clip: greater than 0.
        local_steps, batch_size, cohort, seed: as in `ClipLocalGDJ`.

    The server clips, within the pass that sums up. Source: arXiv:2106.13673.
    """

    lr: float = 1e-2
    server_lr: float = 1.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "lr", "server_lr", "clip")

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """How far the client went in a step, on average."""
        moved = self._moved(task, received[0], client, constant(self.lr))
        return (moved.div_(self.local_steps),)

    @property
    def step(self) -> float:
        """The server's step size."""
        return self.server_lr

    def factors(self, uploads: Uploads) -> dict[int, float]:
        """Those of the mean, times the clip."""
        return {
            c: (1.0 if norms[0] <= self.clip else self.clip / norms[0]) / len(uploads)
            for c, norms in uploads.norms.items()
        }
