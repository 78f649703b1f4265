"""Where signs alone do not converge, and error feedback does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pysmooth

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel
from ..runs import F64, Runs, descend

Make = Callable[[list[nn.Parameter], float], Optimizer]
SIGN: Make = lambda params, lr: pysmooth.SignSGD(params, lr)  # noqa: E731
EF: Make = lambda params, lr: pysmooth.EFSGD(params, lr, pysmooth.ScaledSign())  # noqa: E731
SGD: Make = lambda params, lr: pysmooth.ClipSGD(params, lr)  # noqa: E731


def _line(config: Config, make: Make, label: str) -> Curve:
    """Least x / 4 on [-1, 1]; the gradient is 4 with probability 1/4, else -1."""
    generator = config.generator()
    runs = Runs(torch.zeros(config.runs(100, 20), 1, dtype=F64))
    optimizer = make(runs.params, 0.01)

    def step() -> None:
        lucky = torch.rand(runs.x.shape, generator=generator) < 0.25
        runs.grad.copy_(torch.where(lucky, 4.0, -1.0))
        optimizer.step()
        runs.x.clamp_(-1, 1)

    return descend(config, step, lambda: runs.x[:, 0] / 4, config.of(5000, 1500), label, log=False)


def _ridge(config: Config, make: Make, label: str) -> Curve:
    """|x1 + x2| / 2 + |x1 - x2|, from x1 = x2; the subgradient of |.| at 0 is 1."""
    scale = torch.rand(config.runs(20, 5), 1, generator=config.generator(1), dtype=F64) + 0.5
    scale[0] = 1.0
    runs = Runs(scale.expand(-1, 2))
    optimizer = make(runs.params, 0.01)

    def sides() -> tuple[Tensor, Tensor]:
        return runs.x.sum(1), runs.x[:, 0] - runs.x[:, 1]

    def step() -> None:
        plus, minus = (torch.where(side >= 0, 1.0, -1.0) for side in sides())
        runs.grad.copy_(torch.stack([plus / 2 + minus, plus / 2 - minus], dim=1))
        optimizer.step()

    def loss() -> Tensor:
        plus, minus = sides()
        return (plus.abs() / 2 + minus.abs()) / scale[:, 0]

    return descend(config, step, loss, config.of(2000, 600), label, log=False)


def run(config: Config) -> Outcome:
    """Both examples."""
    methods = {"SignSGD": SIGN, "EF-SignSGD": EF, "SGD": SGD}
    line = {name: _line(config, make, name) for name, make in methods.items()}
    ridge = {name: _ridge(config, make, name) for name, make in methods.items()}
    a, b = ({name: float(c.last().median()) for name, c in cs.items()} for cs in (line, ridge))
    below, above = (partial(check, basis="recalled") for check in (Check.below, Check.above))
    checks = [
        above("(a) SignSGD goes the wrong way: f at the end", a["SignSGD"], 0.2),
        below("(a) EF-SignSGD goes the right way: f at the end", a["EF-SignSGD"], -0.2),
        below("(a) SGD as well", a["SGD"], -0.2),
        above(
            "(b) SignSGD gets nowhere: least f, to f at the start",
            float(ridge["SignSGD"].values.min()),
            0.999,
        ),
        below("(b) EF-SignSGD gets near 0: f to f at the start", b["EF-SignSGD"], 0.05),
    ]
    panels = [
        Panel("(a) a line, skewed noise", "iteration", "f", list(line.values()), ylog=False),
        Panel("(b) a ridge", "iteration", "f / f at the start", list(ridge.values()), ylog=False),
    ]
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "e5",
    "Signs without error feedback",
    ("1901.09847",),
    "(a) min x / 4 on [-1, 1], the gradient being 4 with probability 1/4, else -1. (b) "
    "|x1 + x2| / 2 + |x1 - x2| from multiples of (1, 1), exact subgradients. lr = 0.01.",
    run,
)
