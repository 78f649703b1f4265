"""MeritFed and MeritOpt: how much each client counts is learned on the target's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .clients import Client, Task, drawn
from .method import Method, Outcome, State, Upload, check_count, check_positive, move
from .uploads import Uploads

_STRETCH = 1 << 18  # elements
Value = Callable[[Tensor, int], float]
Gradient = Callable[[Tensor, int], Tensor]


@dataclass
class MeritState(State):
    """Besides x: `w`, the clients' weights, in float64."""

    w: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))


@dataclass
class MeritOptState(MeritState):
    """Besides x and w: Adam's two averages."""

    exp_avg: Tensor = field(default_factory=lambda: torch.empty(0))
    exp_avg_sq: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class MeritFed(Method):
    """MeritFed: a step along the clients' gradients, with the weights that help the target most.

    Equivalent to::

        g_i = grad_i(x)                                   # all clients
        for k in range(inner_steps):                      # server: entropic mirror descent
            h = target(x - lr * sum(w_j * g_j), k)        # gradient of the target's loss
            q_j = -lr * <h, g_j>
            w_j = w_j * exp(-inner_lr * q_j) / Z          # Z: their sum
        x -= lr * sum(w_j * g_j)

    w starts from 1/n and is kept from round to round. Clients that are left out of a round keep
    their weights; the others share what remains.

    All gradients are held through the inner steps (n vectors; on disk with `Server(folder=)`): each
    weighs them anew. This is the one thing here that no running sum can do.

    Args:
        lr: step size, greater than 0.
        inner_steps: at least 1.
        inner_lr: step size of the weights, greater than 0.
        clients: their number, n; they are numbered from 0.
        target: `target(y, k)`, the gradient of the target's loss at y. The loss over all of its
            validation data is mirror descent; over the k-th batch, stochastic mirror descent.
        value: `value(y, k)`, the target's loss: with it, and without `target`, the weights'
            gradient is estimated from two values along a random direction e of the unit sphere,
            q = n * (value(w + h e) - value(w - h e)) / (2 h) * e.
        smoothing: h.
        averaging: the weights of a round are the running mean of those of its inner steps, as the
            authors do for neural nets.
        batch_size: samples of a client's gradient; None for all.
        cohort, seed: as in all methods.

    Source: arXiv:2402.05050; the scaling of the zeroth-order estimate is ours.
    """

    lr: float = 1e-2
    inner_steps: int = 10
    inner_lr: float = 1.0
    clients: int = 1
    target: Gradient | None = None
    value: Value | None = None
    smoothing: float = 1e-3
    averaging: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "lr", "inner_lr", "smoothing")
        for name in ("inner_steps", "clients", "batch_size", "cohort"):
            check_count(name, getattr(self, name))
        if (self.target is None) == (self.value is None):
            raise ValueError("one of target (gradients) and value (zeroth order) must be given")

    def start(self, x: Tensor) -> MeritState:
        """All clients count alike."""
        return MeritState(x.detach().clone(), 0, self._uniform())

    def _uniform(self) -> Tensor:
        return torch.full((self.clients,), 1.0 / self.clients, dtype=torch.float64)

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """A gradient."""
        (batch,) = drawn(
            client, self.batch_size, 1, seed=self.seed, first=task.round, who=task.client
        )
        return (client.grad(received[0], batch),)

    def update(self, state: State, uploads: Uploads) -> Outcome:
        """Learns the weights, then moves."""
        assert isinstance(state, MeritState)
        here = torch.tensor(uploads.clients)
        if int(here[-1]) >= self.clients:
            raise ValueError(f"client {int(here[-1])}: there are {self.clients} clients, from 0")
        mass = state.w[here].sum()
        w = averaged = state.w[here] / mass
        for k in range(self.inner_steps):
            q = self._weights_gradient(state, uploads, w, k)
            w = torch.softmax(w.log() - self.inner_lr * q, 0)
            averaged = w if not self.averaging else averaged * (k / (k + 1)) + w / (k + 1)
        # A weight that has come to 0 would stay there for ever, whatever its client sends.
        averaged = averaged.clamp(min=torch.finfo(torch.float64).tiny)
        g, norm = self._sum(uploads, averaged)
        state.w[here] = averaged / averaged.sum() * mass
        state.rounds += 1
        self._move(state, g)
        return Outcome(norm, self.lr, norm)

    def _sum(self, uploads: Uploads, w: Tensor) -> tuple[Tensor, float]:
        return uploads.combine(dict(zip(uploads.clients, w.tolist(), strict=True)))

    def _weights_gradient(self, state: MeritState, uploads: Uploads, w: Tensor, k: int) -> Tensor:
        if self.target is not None:
            g, _ = self._sum(uploads, w)
            y, along = self._candidate(state, g)
            h = self.target(y, k)
            if along is None:
                return -uploads.dots(h) * self.lr
            return -uploads.dots(along.mul_(h))
        assert self.value is not None
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + state.rounds) * self.inner_steps + k
        )
        e = torch.randn(len(w), generator=generator, dtype=torch.float64)
        e /= e.norm()
        values = []
        for sign in (1.0, -1.0):
            g, _ = self._sum(uploads, w + sign * self.smoothing * e)
            values.append(self.value(self._candidate(state, g)[0], k))
        return e * (len(w) * (values[0] - values[1]) / (2 * self.smoothing))

    def _candidate(self, state: MeritState, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where a step along g would end; and -d(step)/dg by coordinate, if it is not lr.

        g may be overwritten: as many vectors as can be are spared.
        """
        return g.mul_(-self.lr).add_(state.x), None

    def _move(self, state: MeritState, g: Tensor) -> None:
        move(state.x, g, self.lr)


@dataclass(frozen=True)
class MeritOpt(MeritFed):
    """MeritOpt: MeritFed whose step is Adam's; the weights' gradient goes through it.

    Equivalent to `MeritFed` with::

        m = b1 * m + (1 - b1) * g;  v = b2 * v + (1 - b2) * g * g
        step = -lr * (m / (1 - b1**t)) / sqrt(v / (1 - b2**t) + eps)     # eps within the root

    for the candidates, of which m and v are not kept, as for the step itself; q_j is
    <h, d step / d w_j>.

    Args:
        betas: in [0, 1).
        eps: greater than 0.
        Others: see `MeritFed`.

    State: `exp_avg`, `exp_avg_sq`, a vector each. Source: arXiv:2406.12564.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "eps")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be in [0, 1); got {self.betas}")

    def start(self, x: Tensor) -> MeritOptState:
        """Adam's averages start from 0."""
        zeros = torch.zeros_like(x)
        return MeritOptState(x.detach().clone(), 0, self._uniform(), zeros, zeros.clone())

    def _averages(
        self, first: Tensor, second: Tensor, g: Tensor, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first average, the second, and the unbiased second's root."""
        b1, b2 = self.betas
        m = first * b1 + g * (1 - b1)
        v = second * b2 + g * g * (1 - b2)
        return m, v, (v / (1 - b2**t) + self.eps).sqrt()

    def _candidate(self, state: MeritState, g: Tensor) -> tuple[Tensor, Tensor | None]:
        assert isinstance(state, MeritOptState)
        b1, b2 = self.betas
        t = state.rounds + 1
        slope = torch.empty_like(g)
        for x, first, second, part, out in _stretches(
            state.x, state.exp_avg, state.exp_avg_sq, g, slope
        ):
            m, _, root = self._averages(first, second, part, t)
            m /= 1 - b1**t
            by_second = m * part * ((1 - b2) / (1 - b2**t)) / root**3
            out.copy_(((1 - b1) / (1 - b1**t) / root - by_second) * self.lr)
            part.copy_(x - self.lr * m / root)
        return g, slope

    def _move(self, state: MeritState, g: Tensor) -> None:
        assert isinstance(state, MeritOptState)
        step = self.lr / (1 - self.betas[0] ** state.rounds)
        for x, first, second, part in _stretches(state.x, state.exp_avg, state.exp_avg_sq, g):
            m, v, root = self._averages(first, second, part, state.rounds)
            first.copy_(m)
            second.copy_(v)
            move(x, m / root, step)


def _stretches(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some elements of each at a time: what is made of them stays in cache, and is no vector."""
    for begin in range(0, len(vectors[0]), _STRETCH):
        yield tuple(v[begin : begin + _STRETCH] for v in vectors)
