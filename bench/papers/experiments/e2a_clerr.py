"""Reshuffling clipped once in an epoch, against shuffled SGD with a clip in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pysmooth.federated import CLERR, nastya
from pysmooth.federated.clients import descend, shuffled

from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel
from ..quartic import client, points, race, value

C0, C1, BATCH = 500.0, 0.005, 32
STEPS = 32  # batches in an epoch: what SO and CSO would send, CLERR and NASTYA send one


def _sgd(
    config: Config, label: str, size: Callable[[Tensor], float], seeds: int, epochs: int
) -> Curve:
    """Shuffled once, a step for every batch."""
    data, rows = points(1), []
    owner = client(data)
    for seed in range(seeds):
        batches = shuffled(owner, BATCH, seed=seed, epoch=0, who=0)
        x = torch.full((1,), 1000.0, dtype=torch.float64)
        row = [value(data, x)]
        for _ in config.steps(epochs, f"{label}, run {seed + 1}"):
            x -= descend(owner, x, batches, size)[1]
            row.append(value(data, x))
        rows.append(row)
    return Curve(label, [float(i) for i in range(epochs + 1)], torch.tensor(rows).double())


def run(config: Config) -> Outcome:
    """One client, one dimension, x0 = 1000."""
    seeds, epochs, data = config.runs(10, 2), config.of(100, 40), points(1)
    one = {0: client(data)}

    def clerr(inner: float, source: Literal["exact", "pseudo"], label: str) -> Curve:
        methods = [
            CLERR(
                lr=inner,
                c0=C0,
                c1=C1,
                batch_size=BATCH,
                shuffle="once",
                norm_source=source,
                seed=seed,
            )
            for seed in range(seeds)
        ]
        return race(config, label, list(methods), one, data, 1000.0, epochs)

    steady = [
        nastya(1e-7, 1e-6, batch_size=BATCH, shuffle="once", seed=seed) for seed in range(seeds)
    ]
    shuffle_once = _sgd(config, "SO", lambda g: 1e-7, seeds, epochs)
    clipped = _sgd(config, "CSO", lambda g: 1e-4 * min(1.0, 1e4 / float(g.norm())), seeds, epochs)
    slow = race(config, "NASTYA", list(steady), one, data, 1000.0, epochs)
    pseudo = clerr(1e-7, "pseudo", "CLERR, ||g||")
    finer = clerr(1e-8, "pseudo", "CLERR, ||g||, lr 1e-8")
    exact = clerr(1e-7, "exact", "CLERR, ||grad f||")

    def last(curve: Curve) -> float:
        return float(curve.last().mean())

    floor = last(pseudo) / last(finer)
    checks = [
        Check.below("CLERR is at 1e-6 by epoch 20", float(pseudo.at(20).mean()), 1e-6),
        Check.above(
            "clipped SGD still is above 1e-2 when CLERR is there", float(clipped.at(20).min()), 1e-2
        ),
        Check.above("shuffled SGD never comes below 1e4", last(shuffle_once), 1e4),
        Check.above("NASTYA never comes below 1e5", last(slow), 1e5),
        Check.near("a tenth of the inner step: a hundredth of the floor", floor, 100, 0.15,
                   basis="derived"),
        Check.near("with the exact norm these c0, c1 end in a cycle: f - f*", last(exact), 1.5e8,
                   0.1, basis="derived"),
    ]  # fmt: skip
    checks.append(
        Check.above(
            f"by upload: CSO, with {STEPS} in an epoch, is above CLERR's 20th after all its "
            f"{STEPS * epochs:,} (ratio)",
            float(clipped.last().min()) / float(pseudo.at(20).mean()), 1.0, basis="derived",
        )
    )  # fmt: skip
    if not config.quick:
        checks += [
            Check.near("SO at epoch 100", last(shuffle_once), 1.9e5, 0.3, basis="derived"),
            Check.near("NASTYA at epoch 100", last(slow), 2.1e6, 0.3, basis="derived"),
            Check.below("CSO's plateau at epoch 100 is about 0.1", last(clipped), 0.3,
                        why="a simulation made beforehand came to 0.86; the reason is not known"),
        ]  # fmt: skip
    curves = [shuffle_once, clipped, slow, pseudo, finer, exact]
    sent = (STEPS, STEPS, 1, 1, 1, 2)
    uploads = [
        Curve(c.label, [n * at for at in c.x], c.values) for c, n in zip(curves, sent, strict=True)
    ]
    panels = [
        Panel("d = 1, x0 = 1000", "epoch", "f - f*", curves),
        Panel("by what is uploaded", "vectors uploaded", "f - f*", uploads, xlog=True),
    ]
    notes = (
        "An upload of SO and CSO is the gradient of a batch, as a client would send it to a server "
        "that steps and clips; one of CLERR and NASTYA is that of an epoch. For the exact norm a "
        "second vector is sent."
    )
    return Outcome(panels, checks, notes)


EXPERIMENT = Experiment(
    "e2a",
    "CLERR on a quartic: clipping once in an epoch, and which norm",
    ("2412.02781",),
    "f(x) = mean (x - x_i)^4, 1,000 points, batches of 32, shuffled once; SO lr 1e-7, CSO lr 1e-4 "
    "and clip 1e4, NASTYA 1e-6 (inner 1e-7), CLERR c0 = 500, c1 = 0.005, inner step 1e-7: the "
    "authors' tuned values. L1 of a quartic is 3, so c1 is far below 2 L1.",
    run,
)
