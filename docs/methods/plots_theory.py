"""Draws the pictures of theory.md: `python docs/methods/plots_theory.py`.

Exact gradients: step sizes on ||x||^4, and the local smoothness along a run on a deep linear net.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from plots import draw
from torch import Tensor

import pysmooth
from pysmooth.diagnostics import estimate_smoothness, plot_smoothness

STEPS, DIM, DISTANCE = 200, 10, 5.0
L0, L1 = 4.0, 3.0  # of ||x||^4
LARGEST = 12 * DISTANCE**2  # its curvature at the start

MAKES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD, 1 / L": lambda p: torch.optim.SGD(p, 1 / LARGEST),
    "L0L1GD, eta = nu / 2": lambda p: pysmooth.L0L1GD(p, L0, L1, 0.2836),
    "L0L1GD, eta = 1": lambda p: pysmooth.L0L1GD(p, L0, L1),
    'STM, "max"': lambda p: pysmooth.STM(p, L0, L1),
    'STM, "plain"': lambda p: pysmooth.STM(p, L0, L1, variant="plain"),
    "AdGD": lambda p: pysmooth.AdGD(p),
    "PolyakSGD": lambda p: pysmooth.PolyakSGD(p),
}


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Tensor:
    """f, step by step."""
    x = torch.nn.Parameter(torch.full((DIM,), DISTANCE / DIM**0.5, dtype=torch.float64))
    optimizer = make([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x**2).sum() ** 2
        loss.backward()
        return loss.detach()

    return torch.stack([optimizer.step(closure) for _ in range(STEPS)]).clamp(min=1e-20)


def smoothness(path: Path) -> None:
    """A product of three matrices that learns another, from small weights."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    params = list(net.parameters())
    inputs, target = torch.randn(256, 8), torch.randn(8, 8)
    optimizer = torch.optim.SGD(params, 0.01)
    points, gradients = [], []
    for _ in range(400):
        optimizer.zero_grad()
        (net(inputs) - inputs @ target).square().sum(1).mean().backward()
        points.append(torch.cat([p.detach().flatten() for p in params]))
        gradients.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
        optimizer.step()
    axes = plot_smoothness(estimate_smoothness(points, gradients))
    axes.figure.tight_layout()  # type: ignore[union-attr]
    axes.figure.savefig(path, dpi=90)


def main(folder: Path) -> None:
    """Writes both."""
    torch.set_num_threads(1)
    curves = {label: (range(STEPS), run(make)) for label, make in MAKES.items()}
    draw(folder / "theory.png", curves, "step", "f - f*, ||x||^4 from ||x|| = 5")
    smoothness(folder / "smoothness.png")


if __name__ == "__main__":
    main(Path(__file__).parent)
