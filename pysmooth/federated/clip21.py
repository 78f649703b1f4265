"""Clip21-SGD2M between clients and a server, and Clip-SGD, with noise for local privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.recipe import Recipe
from ..optim.clip21 import Clip21SGD2M as _OnOneWorker
from ..optim.clip21 import _recipe
from .clients import Client, Task, drawn
from .method import Method, Outcome, State, Upload, check_count, check_positive, equally, move
from .uploads import Uploads


@dataclass
class EstimateState(State):
    """Besides x: the server's estimate of the gradient, and how many clients there are."""

    estimate: Tensor = field(default_factory=lambda: torch.empty(0))
    clients: int = 0


class Worker:
    """A client's part of Clip21-SGD2M: its momentum and its estimate, and the noise it adds.

    The step is that of `pysmooth.Clip21SGD2M` with noise, one fused pass after that of the norm:
    with lr = 0 the parameter stays, and the server's estimate, emptied, becomes the message.
    """

    def __init__(self, client: Client, method: ClippedMessages, number: int, x: Tensor) -> None:
        self.client, self.samples = client, client.samples
        self._param = nn.Parameter(torch.zeros_like(x))
        # By client as well: clients' noise must be independent.
        seed = (method.noise_seed + number * 0x9E3779B97F4A7C15) % 2**64
        beta, beta_hat = (method.beta, method.beta_hat) if method.feedback else (1.0, 1.0)
        self.optimizer = _Message(
            *([self._param], 0.0, method.tau, beta, beta_hat, method.noise_std),
            seed=seed,
            nonfinite="raise",
        )
        self._before: Tensor | None = None
        self._asked = -1
        self._feedback = method.feedback

    def grad(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """The client's gradient."""
        return self.client.grad(x, batch)

    def message(self, g: Tensor, task: Task) -> Tensor:
        """beta_hat * (clip(v - estimate) + noise); v and the estimate move on.

        If the server did not take the last message the estimate goes back to what it was before it:
        otherwise it would no more be the client's part of the server's.
        """
        state = self.optimizer.state[self._param]
        if not self._feedback and state:
            state["grad_estimate"].zero_()
        elif self._before is not None and task.taken != self._asked:
            state["grad_estimate"].copy_(self._before)
        if state:
            state["server_estimate"].zero_()
            self._before = state["grad_estimate"].clone()
        self._param.grad = g
        self.optimizer.step()
        self._param.grad = None
        state = self.optimizer.state[self._param]
        if self._before is None:
            self._before = torch.zeros_like(state["grad_estimate"])
        self._asked = task.round
        message: Tensor = state["server_estimate"].clone()
        return message

    def state_dict(self) -> dict[str, Any]:
        """What a client must know to go on, to the bit."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "before": self._before,
            "asked": self._asked,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes the values of `state_dict`."""
        self.optimizer.load_state_dict(saved["optimizer"])
        before = saved["before"]
        self._before = None if before is None else before.clone()
        self._asked = int(saved["asked"])


class _Message(_OnOneWorker):
    """The rule with noise also where its standard deviation is 0: what is sent is a state of it."""

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        return _recipe(group, "clip21_sgd2m", "grad_estimate", "momentum_buffer", noisy=True)


@dataclass(frozen=True)
class ClippedMessages(Method):
    """What Clip21-SGD2M and Clip-SGD share. Clients must be `Worker`s, made by `worker`.

    Args:
        lr: the server's step size, greater than 0.
        tau: clipping threshold of messages, greater than 0.
        noise_std: standard deviation of the noise that each client adds, per coordinate: see
            `noise_for_budget`.
        noise_seed: of the noise. Whoever knows it can take the noise out again: privacy needs one
            that only the client knows.
        batch_size: samples of a gradient; None for all.
        cohort, seed: as in all methods.
    """

    lr: float = 1e-2
    tau: float = 1.0
    noise_std: float = 0.0
    noise_seed: int = 0
    batch_size: int | None = None

    feedback = False
    beta = 1.0
    beta_hat = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "lr", "tau")
        check_positive(self, "noise_std", zero=True)
        check_count("cohort", self.cohort)
        check_count("batch_size", self.batch_size)
        for name in ("beta", "beta_hat"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {getattr(self, name)!r}")

    def worker(self, client: Client, number: int, x: Tensor) -> Worker:
        """The client with what the method keeps for it."""
        return Worker(client, self, number, x)

    def start(self, x: Tensor) -> EstimateState:
        """Estimates start from 0."""
        return EstimateState(x.detach().clone(), 0, torch.zeros_like(x) if self.feedback else x[:0])

    def participants(self, state: State, clients: Sequence[int]) -> list[int]:
        """Who is asked; those that are not add nothing to the estimate."""
        assert isinstance(state, EstimateState)
        state.clients = len(clients)
        return super().participants(state, clients)

    def reply(self, task: Task, received: Upload, client: Client) -> Upload:
        """The clipped message, with noise."""
        if not isinstance(client, Worker):
            raise TypeError("clients of this method are made by method.worker(client, number, x)")
        (batch,) = drawn(
            client, self.batch_size, 1, seed=self.seed, first=task.round, who=task.client
        )
        return (client.message(client.grad(received[0], batch), task),)


@dataclass(frozen=True)
class ClipSGD(ClippedMessages):
    """Clients send clipped gradients: biased where gradients differ between clients.

    Equivalent to::

        c_i = clip_tau(grad_i(x)) + noise_std * randn     # client i
        x -= lr * mean(c_i)

    Args: see `ClippedMessages`.
    """

    def update(self, state: State, uploads: Uploads) -> Outcome:
        """A step along the mean."""
        g, norm = uploads.combine(equally(uploads))
        move(state.x, g, self.lr)
        state.rounds += 1
        return Outcome(norm, self.lr, norm)


@dataclass(frozen=True)
class Clip21SGD2M(ClippedMessages):
    """Clip21-SGD2M: clipped changes of estimates, with two momenta, and noise for local privacy.

    Equivalent to::

        v_i = (1 - beta) * v_i + beta * grad_i(x)         # client i
        u_i = clip_tau(v_i - h_i)
        c_i = u_i + noise_std * randn                     # is sent
        h_i += beta_hat * u_i
        h += beta_hat / n * sum(c_i)                      # server; n clients, asked or not
        x -= lr * h

    With `beta = beta_hat = 1` it is Clip21-SGD. h is the mean of the h_i plus beta_hat times the
    sum of the noise so far, divided by n: with noise take a small beta_hat.

    Args:
        beta: weight of the new gradient in the momentum, in (0, 1].
        beta_hat: step of the estimates, in (0, 1].
        Others: see `ClippedMessages`.

    State: `estimate` (h), a vector. Source: arXiv:2502.11682.
    """

    beta: float = 0.1
    beta_hat: float = 1.0

    feedback = True

    def update(self, state: State, uploads: Uploads) -> Outcome:
        """Moves the estimate, then x along it."""
        assert isinstance(state, EstimateState)
        change, norm = uploads.combine(dict.fromkeys(uploads.clients, 1.0 / state.clients))
        state.estimate += change
        move(state.x, change.copy_(state.estimate), self.lr)
        state.rounds += 1
        return Outcome(norm, self.lr, norm)
