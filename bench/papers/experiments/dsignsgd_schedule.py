"""DSignSGD under noise without a mean: constant and decreasing steps."""

from __future__ import annotations

import torch
from torch import Tensor

import pysmooth
from pysmooth import distributed

from ..cluster import Cluster
from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel
from ..runs import Runs, descend

N, D, LR = 8, 50, 0.1


def _descend(config: Config, sigma: float, decreasing: bool) -> Curve:
    generator = config.generator()
    s = config.runs(20, 10)
    # Signs know no neighbours: the coordinates of all runs are one tensor.
    runs = Runs(torch.ones(1, s * D))
    optimizer = pysmooth.ClipSGD(runs.params, LR)
    cluster = Cluster(distributed.DSignSGD(), N)
    k = 0

    def step() -> None:
        nonlocal k
        shape = (N, 1, s * D)
        above, below = (torch.randn(shape, generator=generator) for _ in range(2))
        runs.grad.copy_(cluster.mean(runs.x + sigma * above / below))
        optimizer.param_groups[0]["lr"] = LR / (k + 1) ** 0.5 if decreasing else LR
        optimizer.step()
        k += 1

    def loss() -> Tensor:
        return runs.x.view(s, D).square().sum(1) / 2

    name = "1/sqrt(k+1)" if decreasing else "constant"
    return descend(config, step, loss, config.of(20_000, 3000), f"{name}, sigma = {sigma:g}")


def run(config: Config) -> Outcome:
    """Scales of the noise, with both step sizes."""
    curves, checks = [], []
    for sigma in config.of((0.1, 1.0, 10.0), (0.1, 1.0)):
        constant = _descend(config, sigma, False)
        decreasing = _descend(config, sigma, True)
        curves += [constant, decreasing]
        middle, last = constant.x[-1] / 4, constant.x[-1]
        steady = float(constant.at(middle).median()), float(constant.at(last).median())
        checks.append(
            Check.near(
                f"sigma = {sigma:g}, constant lr: a plateau (f at the end, to f at a quarter)",
                steady[1] / steady[0],
                1.0,
                0.35,
                why="still on the way at a quarter",
            )
        )
        falls = float(decreasing.at(last).median()) / float(decreasing.at(middle).median())
        checks.append(
            Check.below(
                f"sigma = {sigma:g}, lr / sqrt(k + 1): f goes on to fall (the same ratio)",
                falls,
                0.7,
            )
        )
        checks.append(
            Check.below(
                f"sigma = {sigma:g}: f at the end, with lr / sqrt(k + 1) to constant lr",
                float(decreasing.last().median()) / steady[1],
                0.2,
                why="it is lower, but the fall has not gone as far yet",
            )
        )
    return Outcome([Panel("N = 8, d = 50", "iteration", "f", curves, xlog=True)], checks)


EXPERIMENT = Experiment(
    "dsignsgd-schedule",
    "DSignSGD converges under Cauchy noise with lr / sqrt(k + 1)",
    ("2506.00181",),
    "f = ||x||^2 / 2 in 50 dimensions from ones, N = 8 workers, Student-t noise with nu = 1 (no "
    "mean) and scale sigma, lr = 0.1; signs averaged as the hook of DSignSGD does. The paper "
    "trains an MLP, whose details are not known.",
    run,
)
