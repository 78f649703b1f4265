"""Many runs in one loop: rows of a matrix, each a tensor of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .outcome import Config, Curve

F64 = torch.float64


class Runs:
    """S runs of d coordinates.

    Args:
        start: (S, d).

    Attributes:
        x: (S, d), where the runs are; its rows are `params`.
        grad: (S, d), their gradients: `runs.grad.copy_(...)` before a step.
        params: for an optimizer with scope="tensor".
    """

    def __init__(self, start: Tensor) -> None:
        self.x = start.detach().clone()
        self.grad = torch.zeros_like(self.x)
        self.params = [nn.Parameter(row) for row in self.x]
        for p, grad in zip(self.params, self.grad, strict=True):
            p.grad = grad

    def groups(self) -> list[dict[str, object]]:
        """A group per run, for optimizers with scope="group"."""
        return [{"params": [p]} for p in self.params]


class Workers:
    """n workers of each run, and what they send: steps of one optimizer from 0.

    An optimizer that follows an estimate moves a parameter that lies at 0, with lr = 1, to minus
    that estimate. What error feedback sends is in units of the parameter: its lr is the method's,
    and the server's is 1.

    Args:
        make: the workers' optimizer, with scope="tensor".
        workers: n.
        runs: the server's.
    """

    def __init__(
        self, make: Callable[[list[nn.Parameter]], Optimizer], workers: int, runs: Runs
    ) -> None:
        s, d = runs.x.shape
        self._all = Runs(torch.zeros(workers * s, d, dtype=runs.x.dtype))
        self.grad = self._all.grad.view(workers, s, d)
        self._sent = self._all.x.view(workers, s, d)
        self.optimizer = make(self._all.params)

    @torch.no_grad()
    def mean(self) -> Tensor:
        """(S, d): the mean of what the workers make of `grad` (n, S, d)."""
        self._sent.zero_()
        self.optimizer.step()
        return -self._sent.mean(0)

    @torch.no_grad()
    def forget(self) -> None:
        """Empties the memory of error feedback: what EFSGD sends next is C(lr * gradient)."""
        for state in self.optimizer.state.values():
            state["residual"].zero_()


def places(steps: int, points: int = 150, *, log: bool = True) -> list[int]:
    """Some of 0..steps, the first and the last among them, and 10, 20, 50, 100..."""
    if log:
        chosen = {round(math.exp(math.log(steps) * i / points)) for i in range(points + 1)}
    else:
        chosen = {round(steps * i / points) for i in range(points + 1)}
    round_ones = {m * 10**e for e in range(1, 7) for m in (1, 2, 5)} if log else set()
    return sorted({0, steps} | chosen | {k for k in round_ones if k <= steps})


@torch.no_grad()
def descend(
    config: Config,
    step: Callable[[], object],
    measure: Callable[[], Tensor],
    steps: int,
    label: str,
    *,
    points: int = 150,
    log: bool = True,
) -> Curve:
    """Steps, and what was measured (S,) at some of them: before any, and after the last."""
    wanted = places(steps, points, log=log)
    values = [measure().clone()]
    chosen = set(wanted)
    for k in config.steps(steps, label):
        step()
        if k + 1 in chosen:
            values.append(measure().clone())
    return Curve(label, [float(k) for k in wanted], torch.stack(values, dim=1))
