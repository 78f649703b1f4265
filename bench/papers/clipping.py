"""Clip-SGD, Clip21-SGD and Clip21-SGD2M of many runs at once, with noise or without."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pysmooth

from .runs import Runs, Workers

METHODS = ("Clip-SGD", "Clip21-SGD", "Clip21-SGD2M")
# Budgets and delta of the experiments of arXiv:2502.11682.
BUDGETS, DELTA = (3.0, 5.2, 9.0, 15.6, 27.0), 1e-3
ESTIMATE_STEPS = (0.01, 0.1)  # beta_hat of Clip21-SGD2M under noise for privacy


class Clipping:
    """A method in so many runs: `grad` (n, S, d) before each step.

    Clip-SGD is Clip21-SGD whose estimate is emptied after every message.

    Args:
        name: one of METHODS.
        runs: where they are; every row has a step size of its own.
        lrs: of the rows.
        workers: n.
        tau: threshold of messages.
        noise_std: of the noise per coordinate of a message.
        beta: the momentum of Clip21-SGD2M.
        beta_hat: its step of the estimates.
    """

    def __init__(
        self,
        name: str,
        runs: Runs,
        lrs: Sequence[float],
        workers: int,
        tau: float,
        noise_std: float = 0.0,
        *,
        beta: float = 0.1,
        beta_hat: float = 1.0,
    ) -> None:
        first, second = (beta, beta_hat) if name == "Clip21-SGD2M" else (1.0, 1.0)

        def make(params: list[nn.Parameter]) -> Optimizer:
            return pysmooth.Clip21SGD2M(
                params,
                1.0,
                tau,
                beta=first,
                beta_hat=second,
                noise_std=noise_std,
                scope="tensor",
                nonfinite="zero",  # a run that has gone too far is no reason to stop the others
            )

        self._runs, self._forgets = runs, name == "Clip-SGD"
        self._workers = Workers(make, workers, runs)
        self._server = pysmooth.ClipSGD(runs.params, 1.0)
        self._lrs = torch.tensor(lrs, dtype=runs.x.dtype).unsqueeze(1)
        self.grad = self._workers.grad

    @torch.no_grad()
    def step(self) -> None:
        """Messages, and a step along what the server makes of them."""
        torch.mul(self._workers.mean(), self._lrs, out=self._runs.grad)
        self._server.step()
        if self._forgets:
            for state in self._workers.optimizer.state.values():
                state["grad_estimate"].zero_()
                if "server_estimate" in state:  # with noise
                    state["server_estimate"].zero_()


def exact_delta(epsilon: float, noise_std: float, tau: float, rounds: int) -> float:
    """The least delta of so many messages that one client's data move by 2 tau at most each.

    Together they are one Gaussian mechanism of mu = 2 tau sqrt(rounds) / noise_std, for which there
    is a closed form (arXiv:1805.06530): a check on what the accountant says.
    """
    mu = 2 * tau * math.sqrt(rounds) / noise_std

    def below(z: float) -> float:
        return math.erfc(-z / math.sqrt(2)) / 2

    first, second = below(mu / 2 - epsilon / mu), below(-mu / 2 - epsilon / mu)
    return first - math.exp(epsilon) * second


def best(tails: Tensor) -> int:
    """Which step size ends lowest: of (step sizes, seeds), by the median."""
    return int(tails.nan_to_num(nan=torch.inf).median(dim=1).values.argmin())
