"""Mean estimation by clients, some of whom have the target's distribution: arXiv:2402.05050."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysmooth.federated import FedAvg, FunctionClient, MeritFed, Method, Server
from pysmooth.federated.merit import MeritState

from .outcome import Config, Curve
from .runs import F64

DIMENSION, BATCHES, BATCH = 10, 10, 100
Attack = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Groups:
    """How many clients draw from N(0, I), the target; from N(near, I); from N(far, I)."""

    target: int = 5
    near: int = 95
    far: int = 50

    @property
    def clients(self) -> int:
        """All."""
        return self.target + self.near + self.far

    def masses(self, w: Tensor) -> Tensor:
        """The weight (3,) of each group."""
        parts = torch.tensor_split(w, (self.target, self.target + self.near))
        return torch.stack([part.sum() for part in parts])


class Problem:
    """f(x) = |x|^2 / d, known by samples: gradients 2 (x - mean of a batch) / d.

    Every client has 1,000 samples in ten batches. Of a batch only the mean counts, so that a batch
    is one sample here, of variance 1/100 per coordinate. The far mean has length 1, in every other
    coordinate.

    Args:
        mu: length of the near mean.
        groups: the clients.
        generator: of the samples.
    """

    def __init__(self, mu: float, groups: Groups, generator: torch.Generator) -> None:
        d, n = DIMENSION, groups.clients
        means = torch.zeros(n, 1, d, dtype=F64)
        means[groups.target : groups.target + groups.near] = mu / math.sqrt(d)
        means[groups.target + groups.near :, :, 1::2] = math.sqrt(2 / d)
        noise = torch.randn(n + 1, BATCHES, d, generator=generator, dtype=F64) / math.sqrt(BATCH)
        self.groups, self.validation = groups, noise[n]
        self.clients = {i: _client(own) for i, own in enumerate(means + noise[:n])}
        self.start = torch.full((d,), 1 / math.sqrt(d), dtype=F64)

    def target(self, *, stochastic: bool = False) -> Callable[[Tensor, int], Tensor]:
        """The gradient over the target's 1,000 samples for validation, or over the k-th batch."""
        whole, d = self.validation.mean(0), DIMENSION

        def gradient(y: Tensor, k: int) -> Tensor:
            away = y - (self.validation[k % BATCHES] if stochastic else whole)
            return away.mul_(2 / d)

        return gradient

    def value(self, y: Tensor, k: int) -> float:
        """The loss over those samples, but for what does not depend on y."""
        return float((y - self.validation.mean(0)).square().mean())


def _client(own: Tensor) -> FunctionClient:
    def grad(x: Tensor, batch: Tensor | None) -> Tensor:
        away = x - (own if batch is None else own[batch]).mean(0)
        return away.mul_(2 / DIMENSION)

    return FunctionClient(grad, BATCHES)


def average(lr: float, seed: int) -> FedAvg:
    """SGD along the mean of all gradients."""
    return FedAvg(lr=lr, batch_size=1, by_samples=False, seed=seed)


def walk(
    config: Config,
    label: str,
    methods: Sequence[Method],
    problems: Sequence[Problem],
    rounds: int,
    *,
    clients: int | None = None,
    attack: Attack | None = None,
    every: int = 1,
) -> tuple[Curve, Tensor]:
    """|x|^2, and the weight of each group (runs, points, 3): of one method to each problem.

    Args:
        config: tells how far it is.
        label: of the curve.
        methods: one to each problem.
        problems: one to each run.
        rounds: how many.
        clients: how many of them take part, the first ones; None: all.
        attack: what the far ones send instead, of what they would have and what all would have.
        every: rounds between points.
    """
    errors, masses = [], []
    for run, (method, problem) in enumerate(zip(methods, problems, strict=True)):
        server = Server(method, problem.start)
        owners = dict(list(problem.clients.items())[:clients])
        honest = problem.groups.target + problem.groups.near
        row, weights = [float(server.x.square().sum())], [_masses(server, problem)]
        for i in config.steps(rounds, f"{label}, run {run + 1}"):
            if attack is None:
                server.round(owners)
            else:
                _attacked(server, owners, honest, attack)
            if (i + 1) % every == 0:
                row.append(float(server.x.square().sum()))
                weights.append(_masses(server, problem))
        errors.append(row)
        masses.append(torch.stack(weights))
    places = [float(i) for i in range(0, rounds + 1, every)]
    return Curve(label, places, torch.tensor(errors, dtype=F64)), torch.stack(masses)


def _masses(server: Server, problem: Problem) -> Tensor:
    state = server.state
    if isinstance(state, MeritState):
        return problem.groups.masses(state.w)
    n = problem.groups.clients
    return problem.groups.masses(torch.full((n,), 1 / n, dtype=F64))


def _attacked(
    server: Server, owners: dict[int, FunctionClient], honest: int, attack: Attack
) -> None:
    """A round in which clients from number `honest` on send what the attack makes."""
    method, received = server.method, server.method.sent(server.state)
    own = [method.reply(server.task(i), received, owner)[0] for i, owner in owners.items()]
    uploads = server.uploads()
    for i, answer in enumerate(own):
        server.take(uploads, i, (answer if i < honest else attack(answer, own),))
    server.finish(uploads, len(own))


def merit(
    lr: float,
    inner_lr: float,
    problem: Problem,
    seed: int,
    *,
    stochastic: bool = False,
    zeroth: bool = False,
) -> MeritFed:
    """MeritFed with ten inner steps; `zeroth`: its weights see values alone."""
    return MeritFed(
        lr=lr,
        inner_lr=inner_lr,
        clients=problem.groups.clients,
        target=None if zeroth else problem.target(stochastic=stochastic),
        value=problem.value if zeroth else None,
        batch_size=1,
        seed=seed,
    )
