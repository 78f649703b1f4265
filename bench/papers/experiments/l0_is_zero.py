"""Functions with L0 = 0: linear against sublinear convergence, without strong convexity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import Optimizer

import pysmooth
from pysmooth.optim import L0L1GD, CoordinateDescent, OrderOracleCD

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel, number
from ..runs import F64, Runs, descend, places

D = 100


def _together(config: Config, a: Tensor, label: str, make: Callable[[Runs], Optimizer]) -> Curve:
    runs = Runs(torch.zeros_like(a))
    optimizer = make(runs)

    def step() -> None:
        runs.grad.copy_(-torch.sigmoid(-(a * runs.x).sum(1, keepdim=True)) * a)
        optimizer.step()

    def loss() -> Tensor:
        return softplus(-(a * runs.x).sum(1))

    return descend(config, step, loss, config.of(2000, 300), label)


def _one_by_one(
    config: Config,
    a: Tensor,
    label: str,
    make: Callable[[Tensor, Tensor], Optimizer],
    steps: int,
) -> Curve:
    """Coordinate methods take a closure: a loop for each run."""
    wanted = places(steps)
    rows = []
    for number_of_run, row in enumerate(a):
        x = torch.nn.Parameter(torch.zeros(D, dtype=F64))
        x.grad = torch.zeros_like(x)
        optimizer = make(x, row)
        optimizer.seed = number_of_run  # type: ignore[attr-defined]

        def closure(x: torch.nn.Parameter = x, row: Tensor = row) -> Tensor:
            margin = row @ x.detach()
            assert x.grad is not None
            torch.mul(row, -torch.sigmoid(-margin), out=x.grad)
            return softplus(-margin)

        values = [math.log(2)]
        chosen = set(wanted)
        for k in config.steps(steps, label):
            optimizer.step(closure)  # type: ignore[arg-type]
            if k + 1 in chosen:
                values.append(float(softplus(-(row @ x.detach()))))
        rows.append(values)
    return Curve(label, [float(k) for k in wanted], torch.tensor(rows, dtype=F64))


def _phases(config: Config) -> tuple[Panel, list[Check]]:
    """e^x + e^-x, (2,1)-smooth: how fast f falls above and below ||grad|| = L0 / L1."""
    start = 8 + 4 * torch.rand(config.runs(20, 5), 1, generator=config.generator(1), dtype=F64)
    runs = Runs(start)
    optimizer = L0L1GD(runs.params, 2.0, 1.0, scope="tensor")
    falls = torch.zeros(len(start), dtype=F64)  # the slowest fall while the gradient is large
    large = torch.zeros(len(start))

    def gap() -> Tensor:
        return 2 * (runs.x[:, 0].cosh() - 1)

    def step() -> None:
        runs.grad.copy_(2 * runs.x.sinh())
        above = runs.grad[:, 0].abs() >= 2
        before = gap()
        optimizer.step()
        torch.where(above, torch.maximum(falls, gap() / before), falls, out=falls)
        large.add_(above)

    curve = descend(config, step, gap, 60, "(L0,L1)-GD", log=False)
    bound = 1 - 1 / (4 * start[:, 0])
    checks = [
        Check.below(
            "e^x + e^-x: with ||g|| >= L0/L1, f - f* falls at least by 1 - 1/(4 L1 R) (of it)",
            float((falls / bound).max()),
            1.0,
            basis="derived",
        ),
        Check.below(
            "e^x + e^-x: the phase of large gradients is short (iterations, from R = 8 to 12)",
            float(large.max()),
            8 * float(start.max()) ** 2,
            basis="derived",
        ),
    ]
    return Panel("e^x + e^-x, L0 = 2, L1 = 1", "iteration", "f - f*", [curve]), checks


def run(config: Config) -> Outcome:
    """Gradient, normalised, coordinate and order-oracle methods."""
    generator = config.generator()
    a = torch.randn(config.runs(10, 3), D, generator=generator, dtype=F64)
    norms = a.norm(dim=1)

    def constant(runs: Runs) -> Optimizer:
        groups = [
            {"params": [p], "lr": 4 / float(n) ** 2}
            for p, n in zip(runs.params, norms, strict=True)
        ]
        return pysmooth.ClipSGD(groups)

    def by_theory(runs: Runs) -> Optimizer:
        groups = [
            {"params": [p], "lr": 1 / float(n)} for p, n in zip(runs.params, norms, strict=True)
        ]
        return L0L1GD(groups, 0.0, 1.0, scope="tensor")  # eta / L1 is the group's lr

    gd = _together(config, a, "GD, 1/L", constant)
    theory = _together(config, a, "(L0,L1)-GD", by_theory)
    steps = config.of(2000, 300)
    coordinate = _one_by_one(
        config,
        a,
        "RCD, one L1",
        lambda x, row: CoordinateDescent([x], 0.0, float(row.norm())),
        steps,
    )
    own = _one_by_one(
        config,
        a,
        "RCD, an L1 per coordinate",
        lambda x, row: CoordinateDescent([x], 0.0, [row.abs()]),
        config.of(300, 100),
    )
    lipschitz = _one_by_one(
        config,
        a,
        "RCD, 1/L per coordinate",
        lambda x, row: CoordinateDescent([x], [row.square() / 4], 0.0),
        steps,
    )
    order = _one_by_one(
        config, a, "OrderRCD", lambda x, row: OrderOracleCD([x]), config.of(100, 20)
    )
    checks = []
    half, last = steps / 2, float(steps)
    for curve in (gd, lipschitz):
        ratio = float((curve.at(half) / curve.at(last)).median())
        checks.append(
            Check.near(
                f"{curve.label}: sublinear, f of half the iterations to f of all",
                ratio,
                2.0,
                0.15,
            )
        )
    factor = float((theory.at(21) / theory.at(20)).median())
    checks.append(
        Check.near(
            "(L0,L1)-GD: linear, f falls by 1/e per iteration",
            factor,
            math.exp(-1),
            0.02,
            basis="derived",
        )
    )
    for curve, first, second in (
        (coordinate, steps * 0.4, steps * 0.8),
        (own, 20.0, 80.0),
        (order, 5.0, 15.0),
    ):
        rate = float((curve.at(second) / curve.at(first)).log().median()) / (second - first)
        start = float((curve.at(first) / curve.values[:, 0]).log().median()) / first
        checks.append(
            Check.below(
                f"{curve.label}: linear or faster (rate of fall, early to late)",
                start / rate,
                1.5,
            )
        )
    k = config.of(1000, 300)
    for curve in (theory, coordinate):
        ours, theirs = float(curve.at(k).median()), float(gd.at(k).median())
        checks.append(
            Check(
                f"{curve.label} beats GD at iteration {k}",
                f"{number(ours)} against {number(theirs)}",
                "less",
                ours < theirs,
            )
        )
    panel = Panel(
        "log(1 + exp(-a'x)), L0 = 0",
        "iteration",
        "f - f*",
        [gd, theory, coordinate, own, lipschitz, order],
        xlog=True,
    )
    phases, more = _phases(config)
    return Outcome(
        [panel, phases],
        checks + more,
        "The paper's own example is not known; this function is the one others use.",
    )


EXPERIMENT = Experiment(
    "l0-is-zero",
    "Linear convergence where L0 = 0",
    ("2412.17050",),
    "f(x) = log(1 + exp(-a'x)) in 100 dimensions, a ~ N(0, I), from 0: L0 = 0, L1 = ||a||, "
    "L = ||a||^2 / 4. GD with 1/L, (L0,L1)-GD with eta = 1, random coordinate descent with a "
    "global L1, with |a_i|, and with 1/L_i, order-oracle coordinate descent (bracket 2, 1e-8). And "
    "e^x + e^-x, from 8 to 12, for its two phases.",
    run,
)
