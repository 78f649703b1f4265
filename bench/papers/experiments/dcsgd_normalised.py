"""Compressed SGD on a quartic: which step size stands compression."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

import pysmooth

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel
from ..runs import Runs, Workers, descend

N, D, NOISE, L0, L1 = 8, 32, 0.1, 3.0, 3.0
Make = Callable[[Runs], Optimizer]


def _theory(omega: float) -> Make:
    """0.9 of the bound of theorem 4.2, with noise NOISE ||g||, the norm being the server's."""
    spread = 1 + (omega + D * NOISE**2 * (1 + omega)) / N
    return lambda runs: pysmooth.ClipSGD.from_smoothness(
        runs.params, L0, L1, 0.9 * 2 / spread, scope="tensor"
    )


def _descend(config: Config, omega: int, make: Make, label: str, steps: int) -> Curve:
    generator = config.generator()
    s = config.runs(10, 3)
    runs = Runs(torch.full((s, D), 2.0))
    optimizer = make(runs)
    rand = pysmooth.RandK(k=D // (1 + omega))
    workers = Workers(lambda params: pysmooth.EFSGD(params, 1.0, rand), N, runs)

    def step() -> None:
        exact = runs.x**3
        noise = torch.randn((N, s, D), generator=generator)
        torch.add(exact, NOISE * exact.norm(dim=1, keepdim=True) * noise, out=workers.grad)
        workers.forget()
        runs.grad.copy_(workers.mean())
        optimizer.step()
        runs.x.clamp_(-1e6, 1e6)  # a run that has blown up is left there

    def loss() -> Tensor:
        return (runs.x**4).sum(1) / 4

    return descend(config, step, loss, steps, label)


def run(config: Config) -> Outcome:
    """Constant, normalised by theory, plainly normalised."""
    omegas = config.of((0, 1, 3, 7, 15, 31), (0, 3, 31))
    steps = config.of(3000, 400)
    methods: dict[str, Callable[[int], Make]] = {
        "constant 0.3": lambda omega: lambda runs: pysmooth.ClipSGD(runs.params, 0.3),
        "theory": _theory,
        "0.1 / ||g||": lambda omega: (
            lambda runs: pysmooth.NormalizedSGD(runs.params, 0.1, momentum=0.0, scope="tensor")
        ),
    }
    found = {
        name: {
            omega: _descend(
                config,
                omega,
                make(omega),
                f"omega = {omega}",
                100 if name.startswith("constant") else steps,
            )
            for omega in omegas
        }
        for name, make in methods.items()
    }
    panels = [
        Panel(name, "iteration", "f", list(curves.values()), xlog=True)
        for name, curves in found.items()
    ]
    constant, theory, plain = found.values()
    start = float(theory[0].values[0, 0])
    checks = [
        Check.below(
            "constant lr, omega = 0: converges (f at the end)", float(constant[0].last().max()), 1.0
        ),
        *(
            Check.above(
                f"constant lr, omega = {omega}: diverges (f at the end, to f at first)",
                float(constant[omega].last().median()) / start,
                1e3,
            )
            for omega in omegas
            if omega >= 3
        ),
    ]
    for omega in omegas:
        checks.append(
            Check.below(
                f"theory's step, omega = {omega}: converges (f at the end, to f at first)",
                float(theory[omega].last().max()) / start,
                config.of(1e-5, 1e-1),
            )
        )
    last = omegas[-1]
    checks.append(
        Check.above(
            f"plain normalisation is worse, omega = {last} (its f at the end to theory's)",
            float(plain[last].last().median() / theory[last].last().median()),
            1.0,
            why="the server's gradient is longer, the larger omega is, and so its normalisation "
            "shortens the step as well: in 32 dimensions it is stable",
        )
    )
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "dcsgd-normalised",
    "DCSGD: the step size must know the gradient's norm, and omega",
    ("2506.00181",),
    "f = sum x_j^4 / 4 in 32 dimensions from 2, N = 8 workers, scaled rand-k with omega = d/k - 1, "
    "noise 0.1 ||g|| N(0, I). A constant lr of 0.3, 0.9 of the theorem's bound (ClipSGD."
    "from_smoothness on the server's gradient), and 0.1 / ||g||. Rand-k by EFSGD without its "
    "memory. The paper trains an MLP, whose details are not known.",
    run,
)
