"""MeritFed whose weights are learned from values of the target's loss alone."""

from __future__ import annotations

from ..means import Groups, Problem, average, merit, walk
from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel

GROUPS, MU, LR, SAME = Groups(3, 17, 10), 0.1, 0.04, 12.5
BEFORE = {1.0: 0.0051, 0.1: 0.0017}  # steps of the weights in a simulation made before, its |x|^2


def run(config: Config) -> Outcome:
    """By gradients, and by two values per inner step."""
    rounds = config.of(500, 150)
    problems = [Problem(MU, GROUPS, config.generator(s)) for s in range(config.runs(3, 1))]
    means = [average(LR, seed) for seed in range(len(problems))]
    plain, _ = walk(config, "SGD, all clients", means, problems, rounds)
    ideal, _ = walk(config, "SGD, targets", means, problems, rounds, clients=GROUPS.target)
    first = [merit(LR, SAME, problem, seed) for seed, problem in enumerate(problems)]
    curves = {"gradients": walk(config, "MeritFed, gradients", first, problems, rounds)}
    for inner_lr in config.of((SAME, *BEFORE), (SAME,)):
        methods = [
            merit(LR, inner_lr, problem, seed, zeroth=True) for seed, problem in enumerate(problems)
        ]
        label = f"MeritFed, values, {inner_lr:g}"
        curves[f"{inner_lr:g}"] = walk(config, label, methods, problems, rounds)
    gradients, (values, w) = curves["gradients"][0].last(), curves[f"{SAME:g}"]
    checks = [
        Check.below("by values, with the same step: below the mean of all clients: |x|^2, to its",
                    float((values.last() / plain.last()).median()), config.of(0.1, 0.5),
                    basis="derived"),
        Check.below("by values: far clients have lost 9/10 of their weight",
                    float(w[:, -1, 2].max()), 1 / 30, basis="derived"),
        Check.below("by values: |x|^2, to that by gradients",
                    float((values.last() / gradients).median()), 2.0, basis="derived"),
    ]  # fmt: skip
    if not config.quick:
        checks += [
            Check.near("all clients' mean ends as in a simulation made before: |x|^2",
                       float(plain.last().median()), 0.12, 0.2, basis="derived",
                       why="how many clients of which group it had, and its mu, is not written "
                       "down"),
            *(Check.near(f"by values, with a step of {inner_lr:g}, as there: |x|^2",
                         float(curves[f"{inner_lr:g}"][0].last().median()), end, 0.5,
                         basis="derived",
                         why="there values were scaled otherwise, which is not written down: with "
                         "this estimate, whose mean is the gradient, so small a step learns little")
              for inner_lr, end in BEFORE.items()),
        ]  # fmt: skip
    far = [Curve(c.label, c.x, w[:, :, 2]) for c, w in curves.values()]
    panels = [
        Panel("values against gradients", "round", "|x|^2",
              [plain, ideal, *(c for c, _ in curves.values())]),
        Panel("far clients", "round", "their weight together", far),
    ]  # fmt: skip
    notes = (
        "The paper says that there is such a variant; how the estimate from two values is scaled "
        "(by the number of clients, over a direction of the unit sphere) is this package's choice."
    )
    return Outcome(panels, checks, notes)


EXPERIMENT = Experiment(
    "merit-zeroth",
    "MeritFed whose weights see values of the loss alone",
    ("2402.05050",),
    "As merit-means with mu = 0.1 and 30 clients: 3 targets, 17 near, 10 far; steps of 0.04 for "
    "500 rounds (2,000 of 0.01 in a simulation made before), 10 inner steps of 12.5 by gradients, "
    "of 12.5, 1 and 0.1 by values, whose points are 0.001 from the weights.",
    run,
)
