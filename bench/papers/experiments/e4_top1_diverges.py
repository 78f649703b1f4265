"""Top-1 without error feedback diverges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pysmooth

from ..outcome import Check, Config, Experiment, Outcome, Panel
from ..runs import F64, Runs, Workers, descend

LR = 0.005859
TOP = pysmooth.TopK(k=1)
MAKE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Top-1 alone": lambda params: pysmooth.EFSGD(params, LR, TOP),
    "EF14": lambda params: pysmooth.EFSGD(params, LR, TOP),
    "EF21": lambda params: pysmooth.EF21(params, 1.0, TOP, scope="tensor"),
}
ROWS = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=F64)


def _gradients(x: Tensor) -> Tensor:
    """Of (a_i'x)^2 + ||x||^2 / 4: (3, S, 3)."""
    return 2 * (ROWS @ x.T).unsqueeze(2) * ROWS.unsqueeze(1) + x / 2


def run(config: Config) -> Outcome:
    """Compressed gradient descent, EF14 and EF21."""
    steps = config.of(5000, 600)
    scale = torch.rand(config.runs(10, 3), 1, generator=config.generator(), dtype=F64) + 0.5
    scale[0] = 1.0
    curves = []
    for name in MAKE:
        runs = Runs(scale.expand(-1, 3))
        server = pysmooth.ClipSGD(runs.params, LR if name == "EF21" else 1.0)
        workers = Workers(MAKE[name], 3, runs)

        def step(
            name: str = name,
            runs: Runs = runs,
            workers: Workers = workers,
            server: Optimizer = server,
        ) -> None:
            if name == "Top-1 alone":
                workers.forget()
            workers.grad.copy_(_gradients(runs.x))
            runs.grad.copy_(workers.mean())
            server.step()

        def squared(runs: Runs = runs) -> Tensor:
            return _gradients(runs.x).mean(0).square().sum(1)

        curves.append(descend(config, step, squared, steps, name, log=False))
    alone, ef14, ef21 = curves
    growth = (alone.last() / alone.values[:, 0]) ** (0.5 / steps)
    checks = [
        Check.near(
            "without feedback x is multiplied by 1 + 11 lr / 6 in every step",
            float(growth.median()) - 1,
            11 * LR / 6,
            1e-3,
            basis="recalled",
        )
    ]
    checks += [
        Check.below(
            f"{curve.label} converges: ||grad||^2 at the end",
            float(curve.last().max()),
            config.of(1e-25, 1.0),
            basis="recalled",
        )
        for curve in (ef14, ef21)
    ]
    panel = Panel("three quadratics", "iteration", "||grad f||^2", curves)
    return Outcome([panel], checks)


EXPERIMENT = Experiment(
    "e4",
    "Top-1 without error feedback diverges",
    ("2002.12410", "2106.05203"),
    "The example of Beznosikov et al.: f_i(x) = (a_i'x)^2 + ||x||^2 / 4 with a = (-3, 2, 2), "
    "(2, -3, 2), (2, 2, -3), from multiples of (1, 1, 1), Top-1, lr = 0.005859 (EF21's theory).",
    run,
)
