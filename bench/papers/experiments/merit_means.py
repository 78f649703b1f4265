"""MeritFed finds the clients whose data help, without being told which they are."""

from __future__ import annotations

from torch import Tensor

from ..means import Groups, Problem, average, merit, walk
from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel

# The near mean's length: the authors' step of the weights, and their |x|^2 at the end, of all
# clients' mean, of the targets' mean, and of MeritFed.
PUBLISHED = {
    0.001: (3.5, 0.10936, 0.00260, 0.00011),
    0.01: (4.5, 0.11205, 0.00260, 0.00008),
    0.1: (12.5, 0.14260, 0.00260, 0.00192),
}
LR = 0.2
NAMES = ("target", "near", "far")


def _race(config: Config, mu: float) -> tuple[dict[str, Curve], list[Curve]]:
    """|x|^2 of each method; of MeritFed the weights of the groups."""
    groups = config.of(Groups(), Groups(2, 6, 5))
    rounds, inner_lr = config.of(250, 150), PUBLISHED[mu][0]
    problems = [Problem(mu, groups, config.generator(s)) for s in range(config.runs(3, 1))]
    means = [average(LR, seed) for seed in range(len(problems))]

    def learned(label: str, *, runs: int, stochastic: bool) -> tuple[Curve, Tensor]:
        methods = [
            merit(LR, inner_lr, problem, seed, stochastic=stochastic)
            for seed, problem in enumerate(problems[:runs])
        ]
        return walk(config, f"MeritFed, {label}", methods, problems[:runs], rounds)

    curves = {
        "all": walk(config, "SGD, all clients", means, problems, rounds)[0],
        "ideal": walk(config, "SGD, targets", means, problems, rounds, clients=groups.target)[0],
    }
    curves["md"], w = learned("all validation data", runs=len(problems), stochastic=False)
    curves["smd"], _ = learned("batches of it, one run", runs=1, stochastic=True)
    places = curves["md"].x
    counts = (groups.target, groups.near, groups.far)
    weights = [
        Curve(f"{count} {name}", places, w[:, :, i])
        for i, (name, count) in enumerate(zip(NAMES, counts, strict=True))
    ]
    return curves, weights


def _checks(
    config: Config, mu: float, curves: dict[str, Curve], weights: list[Curve]
) -> list[Check]:
    mean, ideal, md, smd = (curves[name].last() for name in ("all", "ideal", "md", "smd"))
    target, _, far = (float(curve.last().median()) for curve in weights)
    checks = [
        Check.below(f"mu = {mu:g}: MeritFed is far below the mean of all clients: |x|^2, to its",
                    float((md / mean).median()), 0.1),
        Check.near(f"mu = {mu:g}: batches of the validation data do as well as all: |x|^2, to that",
                   float(smd[0] / md[0]), 1.0, 0.1),
        Check.below(f"mu = {mu:g}: far clients have lost their weight", far, 0.02,
                    basis="derived"),
    ]  # fmt: skip
    if config.quick:
        return checks
    _, published, _, theirs = PUBLISHED[mu]
    checks += [
        Check.near(f"mu = {mu:g}: all clients' mean ends where the authors' does: |x|^2",
                   float(mean.median()), published, 0.1),
        Check.below(f"mu = {mu:g}: MeritFed is below the mean of the targets, which nobody told it:"
                    " |x|^2, to its", float((md / ideal).median()), 1.0),
        Check.near(f"mu = {mu:g}: and where the authors' one run ended: |x|^2",
                   float(md.median()), theirs, 0.5,
                   why="it has begun to rise again: the weights fit the mean of the validation "
                   "samples, whose |x|^2 is 0.01 on average, and other samples were drawn there"),
        Check.below(f"mu = {mu:g}: far clients have lost it as in a simulation made before: "
                    "weight of all", float(weights[2].last().max()), 3e-5, basis="derived",
                    why="near the end the weights fit the mean of the validation samples; in a run "
                    "in which that lies towards the far mean, far clients help"),
    ]  # fmt: skip
    if mu == 0.1:
        checks.append(
            Check.near("mu = 0.1: weight of the 5 targets, as in that simulation", target, 0.76,
                       0.15, basis="derived",
                       why="weights differ from run to run as validation samples do")
        )  # fmt: skip
    else:
        checks.append(
            Check.near(f"mu = {mu:g}: near clients count as much as targets: weight of the 5",
                       target, 0.05, 0.3, basis="derived")
        )  # fmt: skip
    return checks


def run(config: Config) -> Outcome:
    """Three lengths of the near mean."""
    errors, weights, checks = [], [], []
    for mu in config.of(tuple(PUBLISHED), (0.1,)):
        curves, learned = _race(config, mu)
        errors.append(Panel(f"mu = {mu:g}", "round", "|x|^2", list(curves.values())))
        weights.append(Panel(f"mu = {mu:g}: what is learned", "round", "weight", learned))
        checks += _checks(config, mu, curves, learned)
    return Outcome(errors + weights, checks)


EXPERIMENT = Experiment(
    "merit-means",
    "MeritFed learns which clients to listen to",
    ("2402.05050",),
    "150 clients with 1,000 samples in 10 dimensions: 5 from N(0, I), the target, 95 from a mean "
    "of length mu, 50 from one of length 1; loss |x - sample|^2 / 10, batches of 100, 1,000 more "
    "of the target's samples for the weights, 10 inner steps of 3.5, 4.5 and 12.5, from |x| = 1. "
    "Steps of 0.2 for 250 rounds, where the authors take 0.01 for 5,000.",
    run,
)
