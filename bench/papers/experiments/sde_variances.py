"""How noise ends up in the parameters: DSGD, DCSGD and DSignSGD against their SDEs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import pysmooth
from pysmooth import distributed, sde

from ..cluster import Cluster
from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel
from ..runs import Runs, Workers, places

LR = 1e-2
Name = Literal["dsgd", "dcsgd", "dsignsgd"]


@dataclass(frozen=True)
class Case:
    """One stationary distribution: f = x^2 / 2, noise of scale sigma, N workers."""

    name: Name
    workers: int
    sigma: float
    nu: float = math.inf
    omega: float = 0.0

    def label(self) -> str:
        """For verdicts."""
        tail = f", nu = {self.nu:g}" if self.nu < math.inf else ""
        tail += f", omega = {self.omega:g}" if self.omega else ""
        method = {"dsgd": "DSGD", "dcsgd": "DCSGD", "dsignsgd": "DSignSGD"}[self.name]
        return f"{method}, N = {self.workers}, sigma = {self.sigma:g}{tail}"

    def predicted(self) -> float:
        """The closed form."""
        return sde.stationary_variance(
            self.name, LR, 1.0, self.sigma, workers=self.workers, nu=self.nu, omega=self.omega
        )

    def rate(self) -> float:
        """How fast the mean decays near 0."""
        return sde.sign_slope(self.nu) / self.sigma if self.name == "dsignsgd" else 1.0

    def model(self) -> sde.SDE:
        """The SDE."""
        if self.name == "dsignsgd":
            return sde.dsignsgd(_same, LR, self.sigma, nu=self.nu, workers=self.workers)
        if self.name == "dcsgd":
            return sde.dcsgd(_same, LR, self.sigma, self.omega, workers=self.workers)
        return sde.dsgd(_same, LR, self.sigma, workers=self.workers)


def _same(x: Tensor) -> Tensor:
    return x


def _noise(case: Case, d: int, generator: torch.Generator) -> Tensor:
    """Student's t of nu = 1, 2, or infinity: (N, 1, d)."""
    shape = (case.workers, 1, d)
    z = torch.randn(shape, generator=generator)
    if case.nu == 1.0:
        z /= torch.randn(shape, generator=generator).abs_()
    elif case.nu == 2.0:  # a chi squared of two degrees is exponential
        z /= torch.rand(shape, generator=generator).log_().neg_().sqrt_()
    return z


def _average(case: Case, runs: Runs) -> Callable[[Tensor], Tensor]:
    """What the method makes of the workers' gradients."""
    if case.name == "dsignsgd":
        return Cluster(distributed.DSignSGD(), case.workers).mean
    if case.name == "dsgd":
        return lambda grads: grads.mean(0)
    rand = pysmooth.RandK(ratio=1 / (1 + case.omega))
    workers = Workers(lambda params: pysmooth.EFSGD(params, 1.0, rand), case.workers, runs)

    def compressed(grads: Tensor) -> Tensor:
        workers.forget()
        workers.grad.copy_(grads)
        return workers.mean()

    return compressed


def _simulate(config: Config, case: Case, d: int) -> tuple[Curve, float]:
    """Squares along the way, and the variance in the second half of 16 relaxation times."""
    generator = config.generator()
    runs = Runs(torch.full((1, d), 1.0))
    optimizer = pysmooth.ClipSGD(runs.params, LR)
    average = _average(case, runs)
    steps = round(config.of(12, 8) / case.rate() / LR)
    wanted, kept, values = set(places(steps, 100, log=False)), [], []
    for k in config.steps(steps + 1, case.label()):
        if k in wanted:
            values.append(runs.x[0] ** 2)
        if k > steps / 2 and k % 10 == 0:
            kept.append(runs.x.var())
        grads = runs.x + case.sigma * _noise(case, d, generator)
        runs.grad.copy_(average(grads))
        optimizer.step()
    curve = Curve(case.label(), sorted(k * LR for k in wanted), torch.stack(values, dim=1))
    return curve, float(torch.stack(kept).mean())


def _slope(config: Config, name: Name, d: int) -> tuple[Curve, float]:
    """The stationary variance against sigma, and the exponent between the ends."""
    sigmas = [1.0, 4.0, 16.0]
    cases = [Case(name, 8, sigma) for sigma in sigmas]
    variances = [_simulate(config, case, d)[1] for case in cases]
    exponent = math.log(variances[-1] / variances[0]) / math.log(sigmas[-1] / sigmas[0])
    label = {"dsgd": "DSGD", "dsignsgd": "DSignSGD"}[name]
    return Curve(label, sigmas, torch.tensor([variances])), exponent


def run(config: Config) -> Outcome:
    """Variances of the methods and of their SDEs, and how they grow with the noise."""
    d = config.runs(1000, 300)
    cases = [
        Case("dsgd", 8, 1.0),
        Case("dcsgd", 8, 1.0, omega=3.0),
        Case("dsignsgd", 1, 1.0, nu=1.0),
        Case("dsignsgd", 8, 10.0, nu=1.0),
        Case("dsignsgd", 1, 10.0, nu=2.0),
        Case("dsignsgd", 1, 1.0),
        Case("dsignsgd", 8, 10.0),
    ]
    cases = config.of(cases, [cases[1], cases[2], cases[5]])
    checks, curves = [], []
    for case in cases:
        curve, variance = _simulate(config, case, d)
        want = case.predicted()
        label = f"{case.label()}: variance at rest, method to closed form"
        checks.append(Check.near(label, variance / want, 1.0, 0.1, basis="recalled"))
        time = curve.x[-1]
        end = sde.euler_maruyama(case.model(), torch.ones(d, 1), time, round(4 * time / LR / 10))
        label = f"{case.label()}: variance at rest, SDE to closed form"
        checks.append(Check.near(label, float(end.var()) / want, 1.0, 0.2, basis="recalled"))
        if case.sigma == 1.0:
            curves.append(curve)
    panels = [Panel("sigma = 1, from 1", "time k lr", "x^2", curves)]
    slopes = []
    powers: list[tuple[Name, float]] = [("dsgd", 2.0), ("dsignsgd", 1.0)]
    for name, want in config.of(powers, powers[:1]):
        curve, exponent = _slope(config, name, d // 2)
        slopes.append(curve)
        claim = f"{curve.label}: the variance grows with this power of sigma"
        checks.append(Check.near(claim, exponent, want, 0.1, basis="recalled"))
    panels.append(Panel("at rest, N = 8", "sigma", "variance", slopes, xlog=True))
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "sde-variances",
    "Variances at rest of DSGD, DCSGD and DSignSGD",
    ("2502.17009", "2506.00181"),
    "f = x^2 / 2 per coordinate, lr = 0.01, coordinates being runs. DSignSGD as its hook encodes "
    "and decodes, Rand-k by EFSGD without its memory, ClipSGD as the step; noise Gaussian, or "
    "Student-t with nu = 1 (no mean), 2. Against the closed forms, and against "
    "Euler-Maruyama of the SDEs.",
    run,
)
