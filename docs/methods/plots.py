"""Draws pictures of the pages here: `python docs/methods/plots.py [names]`.

Logistic regression on drawn data, gradients of single batches with heavy-tailed noise added
(Student's t, 1.5 degrees of freedom). Each curve is the median of 5 seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import pysmooth
from pysmooth import QSGD, Identity, NaturalCompression, RandK, ScaledSign, TopK

DIM, ROWS, STEPS, SEEDS = 100, 2000, 400, 5
Make = Callable[[list[Tensor]], torch.optim.Optimizer]

FAMILIES: dict[str, dict[str, Make]] = {
    "clip-sgd": {
        "torch.optim.SGD": lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, dampening=0.9),
        "ClipSGD, hard": lambda p: pysmooth.ClipSGD(
            p, 1.0, momentum=0.9, dampening=0.9, max_norm=1.0
        ),
        "ClipSGD, smooth": lambda p: pysmooth.ClipSGD(
            p, 1.0, momentum=0.9, dampening=0.9, max_norm=1.0, clip="smooth"
        ),
        "NormalizedSGD": lambda p: pysmooth.NormalizedSGD(p, 0.1, max_norm=1.0),
    },
    "sign": {
        "SignSGD": lambda p: pysmooth.SignSGD(p, 0.01),
        "Signum": lambda p: pysmooth.Signum(p, 0.01),
        "Lion": lambda p: pysmooth.Lion(p, 0.01),
    },
    "adaptive": {
        "torch.optim.Adagrad": lambda p: torch.optim.Adagrad(p, 0.2),
        "Adagrad, max_norm=1": lambda p: pysmooth.Adagrad(p, 0.2, max_norm=1.0),
        "torch.optim.Adam": lambda p: torch.optim.Adam(p, 0.02),
        "Adam, max_norm=1": lambda p: pysmooth.Adam(p, 0.02, max_norm=1.0),
    },
    "adaptive-norm": {
        "AdagradNorm": lambda p: pysmooth.AdagradNorm(p, 2.0, b_init=1.0),
        "AdagradNorm, max_norm=1": lambda p: pysmooth.AdagradNorm(p, 2.0, b_init=1.0, max_norm=1.0),
        "AdamNorm, max_norm=1": lambda p: pysmooth.AdamNorm(p, 0.2, b_init=1.0, max_norm=1.0),
        "AdamDNorm, max_norm=1": lambda p: pysmooth.AdamDNorm(p, 0.2, b_init=1.0, max_norm=1.0),
    },
    "error-feedback": {
        "SGD": lambda p: torch.optim.SGD(p, 0.3),
        "EFSGD, TopK 2 %": lambda p: pysmooth.EFSGD(p, 0.3, TopK(ratio=0.02)),
        "EFSGD, ScaledSign": lambda p: pysmooth.EFSGD(p, 0.3, ScaledSign()),
        "EFSGD, RandK 2 %": lambda p: pysmooth.EFSGD(p, 0.3, RandK(ratio=0.02, scaled=False)),
    },
    "ef21": {
        "EF21": lambda p: pysmooth.EF21(p, 0.3, TopK(ratio=0.1)),
        "EF21SGDM": lambda p: pysmooth.EF21SGDM(p, 0.3, TopK(ratio=0.1)),
        "NormEF21": lambda p: pysmooth.NormEF21(p, 0.05, TopK(ratio=0.1)),
        "NormEF21SGDM": lambda p: pysmooth.NormEF21SGDM(p, 0.05, TopK(ratio=0.1)),
    },
    "clip21": {
        "ClipSGD, max_norm=0.3": lambda p: pysmooth.ClipSGD(p, 0.3, max_norm=0.3),
        "Clip21, tau=0.3": lambda p: pysmooth.Clip21(p, 0.3, tau=0.3),
        "Clip21SGD2M, tau=0.3": lambda p: pysmooth.Clip21SGD2M(p, 0.3, tau=0.3),
        "Clip21SGD2M, tau=3": lambda p: pysmooth.Clip21SGD2M(p, 0.3, tau=3.0),
    },
    "compressors": {
        "dense": lambda p: torch.optim.SGD(p, 0.3),
        "NaturalCompression": lambda p: pysmooth.EFSGD(p, 0.3, NaturalCompression()),
        "QSGD, 16 levels": lambda p: pysmooth.EFSGD(p, 0.3, QSGD(16)),
        "ScaledSign": lambda p: pysmooth.EFSGD(p, 0.3, ScaledSign()),
        "TopK 5 %": lambda p: pysmooth.EFSGD(p, 0.3, TopK(ratio=0.05)),
        "RandK 5 %": lambda p: pysmooth.EFSGD(p, 0.3, RandK(ratio=0.05, scaled=False)),
    },
    "low-precision": {
        "float32": lambda p: pysmooth.ClipSGD(p, 0.02, max_norm=1.0),
        "master_weights": lambda p: pysmooth.ClipSGD(p, 0.02, max_norm=1.0, master_weights=True),
        "kahan": lambda p: pysmooth.ClipSGD(p, 0.02, max_norm=1.0, kahan=True),
        "stochastic_rounding": lambda p: pysmooth.ClipSGD(
            p, 0.02, max_norm=1.0, stochastic_rounding=True
        ),
        "rounded to nearest": lambda p: pysmooth.ClipSGD(p, 0.02, max_norm=1.0),
    },
}
# Heavy tails make a compressor's picture unreadable: there the noise is that of the batches.
HEAVY = {"clip-sgd", "sign", "adaptive", "adaptive-norm"}


def start(name: str, label: str) -> Tensor:
    """The parameters' first values: where 16 bits are few, steps are small beside them."""
    if name != "low-precision":
        return torch.zeros(DIM)
    return torch.ones(DIM, dtype=torch.float32 if label == "float32" else torch.bfloat16)


def run(make: Make, seed: int, first: Tensor, *, heavy: bool) -> list[float]:
    """The loss over all rows, step by step."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, DIM)
    x = torch.randn(ROWS, DIM, generator=generator) * scales
    truth = torch.randn(DIM, generator=generator)
    y = torch.sign(x @ truth + 0.3 * torch.randn(ROWS, generator=generator))
    weight = torch.nn.Parameter(first.clone())
    optimizer = make([weight])
    noise = torch.distributions.StudentT(1.5)
    torch.manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        with torch.no_grad():
            losses.append(float(torch.nn.functional.softplus(-y * (x @ weight.float())).mean()))
        at = torch.randint(ROWS, (50,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.softplus(-y[at] * (x[at] @ weight.float())).mean().backward()
        assert weight.grad is not None
        if heavy:
            weight.grad += 0.05 * noise.sample((DIM,))
        optimizer.step()
    return losses


def draw(
    path: Path,
    curves: dict[str, tuple[Sequence[float], Tensor]],
    xlabel: str,
    ylabel: str,
    *,
    xlog: bool = False,
) -> None:
    """One picture, of places and values by label."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for label, (places, values) in curves.items():
        axis.plot(places, values, label=label, linewidth=1.3)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_yscale("log")
    if xlog:
        axis.set_xscale("log")
    axis.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def bits_of_a_step(make: Make) -> int:
    """What one worker sends in a step of this optimizer."""
    compressor = getattr(make([torch.nn.Parameter(torch.zeros(DIM))]), "compressor", Identity())
    return int(compressor.bits(DIM))


def main(folder: Path, names: Sequence[str]) -> None:
    """Writes one picture per family."""
    torch.set_num_threads(1)
    for name in names:
        curves = {}
        for label, make in FAMILIES[name].items():
            at, heavy = start(name, label), name in HEAVY
            runs = torch.tensor([run(make, seed, at, heavy=heavy) for seed in range(SEEDS)])
            unit = bits_of_a_step(make) if name == "compressors" else 1
            first = 1 if name == "compressors" else 0  # bits are on a logarithmic axis
            steps = range(first, STEPS)
            curves[label] = ([unit * step for step in steps], runs.median(dim=0).values[first:])
        bits = name == "compressors"
        xlabel = "bits that a worker sends" if bits else "step"
        draw(folder / f"{name}.png", curves, xlabel, "loss over all data", xlog=bits)


if __name__ == "__main__":
    main(Path(__file__).parent, sys.argv[1:] or list(FAMILIES))
