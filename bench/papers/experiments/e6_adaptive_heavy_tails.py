"""AdaGrad and Adam norm versions under heavy tails, clipped and not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pysmooth

from ..outcome import Basis, Check, Config, Curve, Experiment, Outcome, Panel, number
from ..runs import F64, Runs, descend

Make = Callable[[list[nn.Parameter], float], Optimizer]


def _adagrad(delayed: bool, clipped: bool) -> Make:
    return lambda params, lr: pysmooth.AdagradNorm(
        params,
        lr,
        b_init=3.0,
        delayed=delayed,
        scope="tensor",
        max_norm=0.5 if clipped else None,
        clip_eps=0.0,
    )


def _adam(clipped: bool) -> Make:
    return lambda params, lr: pysmooth.AdamNorm(
        params,
        lr,
        b_init=3.0,
        scope="tensor",
        max_norm=0.5 if clipped else None,
        clip_eps=0.0,
    )


METHODS: dict[str, Make] = {
    "AdaGrad": _adagrad(False, False),
    "AdaGradD": _adagrad(True, False),
    "Clip-AdaGrad": _adagrad(False, True),
    "Clip-AdaGradD": _adagrad(True, True),
    "Clip-RAdaGradD": lambda params, lr: pysmooth.ClipRAdaGradD(
        params, lr, b_init=3.0, max_norm=0.5, clip_eps=0.0, reweight=lr * lr, scope="tensor"
    ),
    "Adam": _adam(False),
    "Clip-Adam": _adam(True),
}


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of density 3/4 (1 + |t|)^(-5/2): no variance, moments below 1.5."""
    uniform = 1 - torch.rand(shape, generator=generator, dtype=F64)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return sign * (uniform ** (-2 / 3) - 1)


def _descend(config: Config, name: str, lr: float) -> Curve:
    generator = config.generator()
    runs = Runs(torch.full((config.runs(100, 40), 1), 2.0, dtype=F64))
    optimizer = METHODS[name](runs.params, lr)

    def step() -> None:
        runs.grad.copy_(runs.x + _noise(runs.x.shape, generator))
        optimizer.step()

    return descend(config, step, lambda: runs.x[:, 0] ** 2, config.of(10_000, 2000), name)


def _fraction(lr: float) -> str:
    return "1" if lr == 1 else f"1/{round(1 / lr)}"


def _quantile(curve: Curve, q: float) -> float:
    return float(curve.last().quantile(q))


def _checks(found: dict[float, dict[str, Curve]]) -> list[Check]:
    checks = []
    for lr, curves in found.items():
        at = f"gamma = {_fraction(lr)}"

        def compare(
            name: str, at: str = at, curves: dict[str, Curve] = curves, basis: Basis = "paper"
        ) -> Check:
            ours, theirs = (_quantile(curves[f"{c}{name}"], 0.9) for c in ("Clip-", ""))
            return Check(
                f"{at}: clipping makes {name} better (90 % quantile of |x - x*|^2)",
                f"{number(ours)} against {number(theirs)}",
                "less",
                ours < theirs,
                basis,
                "the clipped steps are too short to get there in the time given",
            )

        checks += [compare("AdaGrad"), compare("AdaGradD"), compare("Adam", basis="recalled")]
        if lr < 1 / 16:
            continue
        clipped = curves["Clip-AdaGradD"]
        checks += [
            Check.above(
                f"{at}: without a clip, delay has catastrophes (worst run, to the one with)",
                _quantile(curves["AdaGradD"], 1.0) / _quantile(clipped, 1.0),
                10.0,
                basis="derived",
            ),
            Check.near(
                f"{at}: once clipped, delay makes no difference (ratio of medians)",
                _quantile(clipped, 0.5) / _quantile(curves["Clip-AdaGrad"], 0.5),
                1.0,
                0.5,
                basis="derived",
            ),
        ]
    lr, curves = min(found.items())
    medians = [_quantile(curves[name], 0.5) for name in ("Clip-AdaGradD", "Clip-RAdaGradD")]
    checks.append(
        Check.above(
            f"gamma = {_fraction(lr)}: the weight gamma^2 makes it work (medians, without to with)",
            medians[0] / medians[1],
            100.0,
            basis="derived",
            why="so early both are on their way",
        )
    )
    return checks


def run(config: Config) -> Outcome:
    """A grid of step sizes; three of them in detail."""
    shown = (1.0, 1 / 16, 1 / 128)
    grid = config.of(tuple(2.0**-i for i in range(8)), shown)
    every = {lr: {name: _descend(config, name, lr) for name in METHODS} for lr in grid}
    panels = [
        Panel(
            f"gamma = {_fraction(lr)}",
            "iteration",
            "|x - x*|^2",
            list(every[lr].values()),
            xlog=True,
        )
        for lr in shown
    ]
    ends = [
        Curve(name, list(grid), torch.stack([every[lr][name].last() for lr in grid], dim=1))
        for name in METHODS
    ]
    panels.append(Panel("at the end", "gamma", "|x - x*|^2", ends, xlog=True))
    return Outcome(
        panels,
        _checks({lr: every[lr] for lr in shown}),
        "Quantiles are those of independent runs. In the figures published at first a run is the "
        "mean of all runs before it.",
    )


EXPERIMENT = Experiment(
    "e6",
    "AdaGrad and Adam under heavy tails: the clip, and the delay",
    ("2406.04443",),
    "f(x) = x^2 / 2 from 2, noise of density 3/4 (1 + |t|)^(-5/2) (infinite variance), b0 = 3, "
    "threshold 1/2, 10^4 iterations, gamma = 1 to 1/128; one-dimensional, so norm versions. "
    "Clip-RAdaGradD with the weight gamma^2; Adam-Norm with 0.9, 0.999.",
    run,
)
