"""Normalised EF21 on a polynomial that is (L0,L1)-smooth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

import pysmooth

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel, number
from ..runs import F64, Runs, descend

D, RADIUS, TARGET = 4, 20.0, 1e-4
ROOT = math.sqrt(1 - 1 / D)  # sqrt(1 - alpha), alpha of Top-1
HORIZON = {1.0: 2000, 4.0: 5000, 8.0: 16000}  # K, as the paper chose it
Run = tuple[Curve, Tensor]


def _descend(
    config: Config,
    start: Tensor,
    make: Callable[[Runs], Optimizer],
    lam: float,
    steps: int,
    label: str,
) -> Run:
    """The squared gradient along the runs, and when it was first below the target."""
    runs = Runs(start)
    optimizer = make(runs)
    first = torch.full((len(start),), math.inf, dtype=F64)
    count = 0

    def squared() -> Tensor:
        x = runs.x
        runs.grad.copy_(lam / 6 * x**3 + 2 * lam * x / (1 + x * x) ** 2)
        return runs.grad.square().sum(1)

    def step() -> None:
        nonlocal count
        reached = squared() < TARGET
        first[reached & first.isinf()] = count
        count += 1
        optimizer.step()

    return descend(config, step, squared, steps, label), first


def _methods(l1: float, lam: float) -> dict[str, Callable[[Runs], Optimizer]]:
    smooth = lam * math.sqrt(D) * RADIUS**2 / 2 + 2 * lam
    c1 = l1 / 2 + 2 * ROOT * l1 / (1 - ROOT)
    top = pysmooth.TopK(k=1)

    def normed(lr: float) -> Callable[[Runs], Optimizer]:
        return lambda runs: pysmooth.NormEF21(runs.params, lr, top, scope="tensor")

    return {
        "EF21": lambda runs: pysmooth.EF21(
            runs.params, 1 / (smooth * (1 + ROOT / (1 - ROOT))), top, scope="tensor"
        ),
        "norm-EF21, 1/sqrt(K+1)": normed(1 / math.sqrt(HORIZON[l1] + 1)),
        "norm-EF21, 1/(2 c1)": normed(1 / (2 * c1)),
        "norm-EF21, 0.1/sqrt(K+1)": normed(0.1 / math.sqrt(HORIZON[l1] + 1)),
    }


def run(config: Config) -> Outcome:
    """For every L1, with L0 = 4."""
    seeds = config.runs(20, 4)
    start = 20 + torch.randn(seeds, D, generator=config.generator(), dtype=F64)
    panels, checks = [], []
    for l1 in config.of((1.0, 4.0, 8.0), (1.0,)):
        lam = 4 / (72 / l1**2 + 2)
        found: dict[str, Run] = {}
        for name, make in _methods(l1, lam).items():
            if not name.endswith("0.1/sqrt(K+1)") or l1 == 1.0:
                steps = config.of(20000, 13000)
                found[name] = _descend(config, start, make, lam, steps, name)
        curves = [curve for curve, _ in found.values()]
        panels.append(Panel(f"L1 = {l1:g}", "iteration", "||grad||^2", curves, xlog=True))
        hits = {name: first.median() for name, (_, first) in found.items()}
        for name in ("norm-EF21, 1/sqrt(K+1)", "norm-EF21, 1/(2 c1)"):
            ours, theirs = float(hits[name]), float(hits["EF21"])
            checks.append(
                Check(
                    f"L1 = {l1:g}: {name} needs fewer iterations to {TARGET:g} than EF21",
                    f"{number(ours)} against {number(theirs)} (medians)",
                    "fewer",
                    ours < theirs,
                    why="steps of one length end in a cycle, at ||grad|| of about lam times that "
                    "length: here at the target itself, so most runs never get below it",
                )
            )
        early = {name: float(curve.at(10).median()) for name, (curve, _) in found.items()}
        best = min(v for name, v in early.items() if name != "EF21")
        checks.append(
            Check.below(
                f"L1 = {l1:g}: EF21 is ahead at first (||grad||^2 at iteration 10)",
                early["EF21"],
                best,
            )
        )
        if l1 == 1.0:
            slow = float(hits["norm-EF21, 0.1/sqrt(K+1)"])
            checks.append(
                Check.above(
                    "gamma_0 = 0.1 is much slower than 1 (ratio of iterations)",
                    slow / float(hits["norm-EF21, 1/sqrt(K+1)"]),
                    5.0,
                )
            )
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "e1",
    "Normalised EF21 on an (L0,L1)-smooth polynomial",
    ("2410.16871",),
    "f(x) = lam/24 sum x_i^4 + lam sum x_i^2 / (1 + x_i^2) in 4 dimensions, L0 = 4, L1 = 1, 4, 8, "
    "from N(20, 1); Top-1, one worker. EF21 with its theoretical step, norm-EF21 with "
    "1/sqrt(K + 1), K = 2000, 5000, 16000, and with 1/(2 c1). Iterations until ||grad||^2 < 1e-4.",
    run,
)
