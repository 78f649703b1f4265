"""EF21 against EF14: how long steps may be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pysmooth

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel, number
from ..problems import LIBSVM, Logistic, breast_cancer, libsvm, shards
from ..runs import F64, Runs, Workers, descend

WORKERS, TARGET = 20, 1e-5
TOP = pysmooth.TopK(k=1)


def _descend(
    config: Config, problem: Logistic, start: Tensor, lrs: list[float], ef21: bool, steps: int
) -> Curve:
    """All step sizes at once, each from all starts; its values are (lrs * starts, points)."""
    s = len(start)
    each = [lr for lr in lrs for _ in range(s)]
    runs = Runs(start.repeat(len(lrs), 1))

    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
        return [{"params": [p], "lr": each[i % len(each)]} for i, p in enumerate(params)]

    if ef21:
        workers = Workers(
            lambda params: pysmooth.EF21(params, 1.0, TOP, scope="tensor"), WORKERS, runs
        )
        server = pysmooth.ClipSGD(groups(runs.params))
    else:
        workers = Workers(lambda params: pysmooth.EFSGD(groups(params), 1.0, TOP), WORKERS, runs)
        server = pysmooth.ClipSGD(runs.params, 1.0)

    def step() -> None:
        workers.grad.copy_(problem.gradients(runs.x))
        runs.grad.copy_(workers.mean())
        server.step()

    def squared() -> Tensor:
        return problem.gradients(runs.x).mean(0).square().sum(1)

    return descend(config, step, squared, steps, "EF21" if ef21 else "EF14")


def run(config: Config) -> Outcome:
    """On every data set there is."""
    sets: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"breast cancer": breast_cancer}
    if config.data is not None and not config.quick:
        sets |= {name: partial(libsvm, config.data, name) for name in LIBSVM}
    generator = config.generator()
    panels, checks = [], []
    for name, load in sets.items():
        problem = Logistic(shards(*load(), WORKERS))
        large = problem.samples.numel() > 500_000
        factors = [2.0**i for i in range(0, 12, 2 if config.quick or large else 1)]
        seeds = 1 if large else config.runs(3, 1)
        steps = config.of(1000 if large else 3000, 1500)
        start = torch.randn(seeds, problem.samples.shape[2], generator=generator, dtype=F64)
        lrs = [factor * problem.ef21_step(1) for factor in factors]
        ends, largest, best = {}, {}, []
        for ef21 in (True, False):
            curve = _descend(config, problem, start, lrs, ef21, steps)
            by_lr = curve.values.view(len(lrs), seeds, -1)
            # What it stays at: the last quarter of the places that were looked at.
            late = by_lr[:, :, -max(2, by_lr.shape[2] // 4) :].median(dim=2).values
            ends[ef21] = Curve(curve.label, factors, late.T)
            level = late.median(dim=1).values
            reached = [f for f, v in zip(factors, level.tolist(), strict=True) if v < TARGET]
            largest[ef21] = max(reached, default=0.0)
            at = int(level.argmin())
            bits = [32.0 * k for k in curve.x]
            best.append(Curve(f"{curve.label}, {factors[at]:g} x theory", bits, by_lr[at]))
        panels.append(
            Panel(
                f"{name}: what it stays at", "step / theory", "||grad f||^2", [*ends.values()], True
            )
        )
        panels.append(Panel(f"{name}: at its best", "bits per worker", "||grad f||^2", best, True))
        checks.append(
            Check(
                f"{name}: EF21 reaches {TARGET:g} with longer steps than EF14 (times theory)",
                f"{number(largest[True])} against {number(largest[False])}",
                "longer",
                largest[True] > largest[False],
                "recalled",
                "both were as far as their steps took them in the time given",
            )
        )
        stays = ends[False].values.median(dim=0).values
        low, high = float(stays.min()), float(stays[-1])
        checks.append(
            Check.above(
                f"{name}: EF14 with long steps stays at a level of ||grad||^2 (to its best)",
                high / low,
                100.0,
                basis="recalled",
                why="it stays at one, but not as far above its best",
            )
        )
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "e3",
    "EF21 against EF14: step sizes beyond the theory",
    ("2106.05203",),
    "Logistic regression as in e2, 20 workers with equal parts of the data, Top-1, from N(0, I). "
    "Steps of 1 to 2048 times the one of EF21's theory, for both methods. scikit-learn's breast "
    "cancer; a9a, mushrooms and phishing with --data.",
    run,
)
