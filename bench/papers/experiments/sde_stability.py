"""Which continuous model sees the threshold of the step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pysmooth
from pysmooth import sde

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel
from ..runs import F64, Runs, descend

LRS = [0.5, 1.0, 1.5, 1.8, 1.95, 2.05, 2.2, 2.5]


def _threshold(rows: list[float], x: list[float]) -> float:
    """The middle between the last step that decreased f, and the first that did not."""
    grows = [r > 1 for r in rows]
    if not any(grows):
        return math.inf
    i = grows.index(True)
    return (x[i - 1] + x[i]) / 2 if i else x[0]


def _distance(runs: Runs) -> Tensor:
    return runs.x[:, 0].abs()


def _model(config: Config, gradient: Callable[[Tensor], Tensor], second: bool) -> list[float]:
    """|x| after a time of 20 lr, from 1, to |x| at first; capped."""
    out = []
    for lr in LRS:
        model = (
            sde.sgd_stability(gradient, gradient, lr, 0.0)
            if second
            else sde.dsgd(gradient, lr, 0.0)
        )
        end = sde.euler_maruyama(model, torch.ones(1, 1, dtype=F64), 20.0, config.of(4000, 1000))
        out.append(float(end.abs().clamp(1e-12, 1e12)))
    return out


def run(config: Config) -> Outcome:
    """A parabola, and the first step on a quartic."""
    descent = []
    for lr in LRS:
        runs = Runs(torch.ones(1, 1, dtype=F64))
        optimizer = pysmooth.ClipSGD(runs.params, lr)

        def step(runs: Runs = runs, optimizer: pysmooth.ClipSGD = optimizer) -> None:
            runs.grad.copy_(runs.x)
            optimizer.step()

        curve = descend(config, step, partial(_distance, runs), 100, f"lr = {lr:g}")
        descent.append(float(curve.last().clamp(1e-12, 1e12)))
    classic, corrected = (_model(config, lambda x: x, second) for second in (False, True))
    rows = {"gradient descent": descent, "classic": classic, "corrected": corrected}
    curves = [Curve(name, LRS, torch.tensor([row])) for name, row in rows.items()]
    panels = [Panel("x^2 / 2, from 1", "lr", "|x| at the end", curves)]
    checks = [
        Check.near(
            "parabola: gradient descent grows from this lr on", _threshold(descent, LRS), 2, 0.03
        ),
        Check.near("parabola: the corrected model too", _threshold(corrected, LRS), 2, 0.03),
        Check.above("parabola: the classic model sees no threshold", _threshold(classic, LRS), 2.5),
    ]
    # The quartic: which lr * x^2 repels.
    grid = [0.4, 0.6, 0.64, 0.7, 1.0, 1.5, 1.9, 1.96, 2.04, 2.5]
    steps: list[float] = []
    flows: list[float] = []
    for product in grid:
        runs = Runs(torch.ones(1, 1, dtype=F64))
        runs.grad.copy_(runs.x**3)
        pysmooth.ClipSGD(runs.params, product).step()
        steps.append(float(runs.x.abs()))
        model = sde.sgd_stability(lambda x: x**3, lambda x: 3 * x**5, product, 0.0)
        flows.append(1 + float(model.drift(torch.ones(1, 1, dtype=F64))))
    curves = [
        Curve("gradient descent, one step", grid, torch.tensor([steps])),
        Curve("corrected, 1 + drift", grid, torch.tensor([flows])),
    ]
    panels.append(Panel("x^4 / 4, from 1", "lr x^2", "|x|", curves, ylog=False))
    checks += [
        Check.near(
            "quartic: a step of descent grows from this lr x^2 on", _threshold(steps, grid), 2, 0.03
        ),
        Check.near(
            "quartic: the corrected model repels from this lr x^2 on",
            _threshold(flows, grid),
            2 / 3,
            0.03,
        ),
    ]
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "sde-stability",
    "The model of SGD that sees its step size's threshold",
    ("2506.00181",),
    "dX = -grad f + lr/2 H grad f dt (known from reviews of the later version) against the classic "
    "flow and gradient descent, without noise, on x^2 / 2 and x^4 / 4.",
    run,
)
