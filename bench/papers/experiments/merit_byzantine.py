"""MeritFed when a third of the clients attack."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pysmooth.federated import attacks

from ..means import Attack, Groups, Problem, average, merit, walk
from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel

LR, MU, INNER_LR = 0.2, 0.001, 3.5
LEAST = 1e-6  # drawn in place of what is less
ROUNDS = 100  # of 0.2: 2,000 of 0.01, where a simulation made before had ended


def _flip(own: Tensor, everybody: Sequence[Tensor]) -> Tensor:
    return attacks.bit_flip(own)


def _manipulate(own: Tensor, everybody: Sequence[Tensor]) -> Tensor:
    return attacks.inner_product_manipulation(everybody, 0.1)


def _hide(own: Tensor, everybody: Sequence[Tensor]) -> Tensor:
    return attacks.a_little_is_enough(everybody, 100.0)


# Each attack with |x|^2 of all clients' mean and of MeritFed in that simulation.
ATTACKS: dict[str, tuple[Attack, float | None, float | None]] = {
    "bit flip": (_flip, 0.33, 0.0014),
    "IPM": (_manipulate, 0.0055, 0.00045),
    "ALIE": (_hide, None, None),
}


def run(config: Config) -> Outcome:
    """Three attacks."""
    groups = config.of(Groups(), Groups(2, 8, 5))
    problems = [Problem(MU, groups, config.generator(s)) for s in range(config.runs(3, 1))]
    means = [average(LR, seed) for seed in range(len(problems))]
    merits = [merit(LR, INNER_LR, problem, seed) for seed, problem in enumerate(problems)]
    ideal, _ = walk(config, "SGD, targets", means, problems, ROUNDS, clients=groups.target)
    panels, learned, checks = [], [], []
    for name, (attack, full, ours) in ATTACKS.items():
        plain, _ = walk(config, f"SGD, {name}", means, problems, ROUNDS, attack=attack)
        robust, w = walk(config, f"MeritFed, {name}", merits, problems, ROUNDS, attack=attack)
        panels.append(Panel(name, "round", "|x|^2", [plain, robust, ideal]))
        learned.append(Curve(name, robust.x, w[:, :, 2].clamp(min=LEAST)))
        checks += [
            Check.below(f"{name}: MeritFed is far below the mean of all clients: |x|^2, to its",
                        float((robust.last() / plain.last()).median()), config.of(0.1, 0.5)),
            Check.below(f"{name}: those who attack have lost 9/10 of their weight",
                        float(w[:, -1, 2].max()), 1 / 30, basis="derived",
                        why="in the run in which the mean of the validation samples lies on the "
                        "other side of 0 than the far mean, gradients turned round help to get "
                        "there"),
        ]  # fmt: skip
        if config.quick:
            continue
        checks.append(
            Check.below(f"{name}: MeritFed does as well as the mean of the honest targets: |x|^2, "
                        "to its", float((robust.last() / ideal.last()).median()), 1.0,
                        basis="derived")
        )  # fmt: skip
        if full is not None and ours is not None:
            checks += [
                Check.near(f"{name}: the mean, as in a simulation made before: |x|^2",
                           float(plain.last().median()), full, 0.1, basis="derived",
                           why="there steps were 20 times as small, which leaves 7 % more of "
                           "it, and samples were others"),
                Check.near(f"{name}: MeritFed, as there: |x|^2",
                           float(robust.last().median()), ours, 0.5, basis="derived",
                           why="that was one run: here they end from "
                           f"{float(robust.last().min()):.1g} to {float(robust.last().max()):.1g}"),
            ]  # fmt: skip
    panels.append(Panel("those who attack", "round", "their weight together", learned))
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "merit-byzantine",
    "MeritFed when a third of the clients attack",
    ("2402.05050",),
    "As merit-means with mu = 0.001, where the last 50 of 150 clients send: their own gradient, "
    "turned round (bit flip); -0.1 times the mean of all (IPM); the mean of all less 100 standard "
    "deviations (ALIE). 100 rounds.",
    run,
)
