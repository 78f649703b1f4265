"""A small transformer fine-tuned by LoRA, LoRA-XS, LoRA-SB and in full."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pysmooth
from pysmooth import peft

from ..digits import DigitReader, Digits, batches, digits, loss, pretrained
from ..lora import lora
from ..outcome import Basis, Check, Config, Curve, Experiment, Outcome, Panel

RANK, BATCH, FIRST, WARMUP = 8, 32, 256, 0.02
TARGETS = DigitReader.TARGETS
_LATENT = (1e-2, 3e-2, 1e-1, 3e-1)
RATES = {
    "full": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA": (3e-3, 1e-2, 3e-2, 1e-1),
    "LoRA-XS": _LATENT,
    "LoRA-SB, sign": _LATENT,
    "LoRA-SB, raw": _LATENT,
}
SIGN, RAW = "LoRA-SB, sign", "LoRA-SB, raw"
MORE = (
    "LoRA trains more numbers, and its subspaces move with training, those of LoRA-SB do not; the "
    "paper's models are large"
)
APART = 1000  # learning rates are chosen on a run that is not shown


class _Task(NamedTuple):
    start: DigitReader
    data: Digits
    steps: int

    def adapted(self, name: str, rank: int, rate: float, seed: int) -> nn.Module:
        """The model with what a method trains on it."""
        model, generator = copy.deepcopy(self.start), torch.Generator().manual_seed(seed)
        if name == "full":
            return model
        if name == "LoRA":
            return lora(model, rank, generator, targets=TARGETS)
        if name == "LoRA-XS":
            return peft.lora_xs(model, rank=rank, targets=TARGETS, seed=seed)
        first = batches(self.data.train, FIRST, 1, generator)
        options: dict[str, Any] = {"rank": rank, "step": rate / (WARMUP * self.steps)}
        options["init_grad"] = "sign" if name == SIGN else "raw"
        return peft.lora_sb(model, loss, first, targets=TARGETS, **options)

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss, and the share that is read wrong."""
        with torch.no_grad():
            out: Tensor = model(self.data.test[0])
            wrong = (out.argmax(1) != self.data.test[1]).float().mean()
            return float(nn.functional.cross_entropy(out, self.data.test[1])), float(wrong)


class _Run(NamedTuple):
    trained: int
    state: int  # bytes that the optimizer keeps
    learned: float  # training loss over the last tenth of the steps
    losses: list[float]  # on the test data, at some steps
    wrong: float  # of the test data, at the end


def _fine_tune(
    config: Config, task: _Task, name: str, rank: int, rate: float, seed: int, places: list[int]
) -> _Run:
    model, steps = task.adapted(name, rank, rate, seed), task.steps
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = pysmooth.AdamW(params, rate, weight_decay=0.0)
    data = batches(task.data.train, BATCH, steps, torch.Generator().manual_seed(seed))
    warm, losses, learned = WARMUP * steps, [task.test(model)[0]], 0.0
    last = max(1, steps // 10)
    for k, batch in zip(config.steps(steps, f"{name}, rank {rank}"), data, strict=True):
        factor = min((k + 1) / warm, (steps - k) / (steps - warm), 1.0)
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        learned += float(value.detach()) / last if k >= steps - last else 0.0
        if k + 1 in places:
            losses.append(task.test(model)[0])
    kept = [x for state in optimizer.state.values() for x in state.values()]
    size = sum(x.numel() * x.itemsize for x in kept if isinstance(x, Tensor) and x.dim() > 0)
    return _Run(sum(p.numel() for p in params), size, learned, losses, task.test(model)[1])


def _middle(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def _starts(task: _Task, seeds: range) -> list[Curve]:
    """Test loss before the first step of training, to the model's, by learning rate."""
    at_first = task.test(task.start)[0]
    return [
        Curve(
            name,
            list(_LATENT),
            torch.tensor([
                [task.test(task.adapted(name, RANK, rate, seed))[0] / at_first for rate in _LATENT]
                for seed in seeds
            ]),
        )
        for name in (SIGN, RAW)
    ]  # fmt: skip


def run(config: Config) -> Outcome:
    """Rank 8 step by step; the end of ranks 4 and 16 as well."""
    task = _Task(pretrained(config.of(300, 10)), digits(turned=True), config.of(200, 10))
    places = config.of([10, 20, 50, 100, 200], [5, 10])
    ranks, seeds = config.of((4, RANK, 16), (RANK,)), range(config.runs(3, 1))
    rates, runs = {}, {}
    for name, grid in RATES.items():
        tried = grid[1:2] if config.quick else grid  # one takes no trial

        def learned(rate: float, name: str = name) -> float:
            return _fine_tune(config, task, name, RANK, rate, APART, []).learned

        rates[name] = min(tried, key=learned) if len(tried) > 1 else tried[0]
        for rank in (RANK,) if name == "full" else ranks:
            runs[name, rank] = [
                _fine_tune(config, task, name, rank, rates[name], seed, places) for seed in seeds
            ]
    starts = _starts(task, seeds)
    checks = _sizes(task, runs)
    if not config.quick:  # whose few steps do not tell methods apart
        checks += [*_starting(starts, rates), *_ends(runs)]
    return Outcome(_panels(runs, places, starts), checks, _notes(rates, runs))


Runs = dict[tuple[str, int], list[_Run]]


def _panels(runs: Runs, places: list[int], starts: list[Curve]) -> list[Panel]:
    at = [0.0, *map(float, places)]
    way = [Curve(name, at, torch.tensor([r.losses for r in runs[name, RANK]])) for name in RATES]
    losses, errors = [], []
    for name in RATES:
        sizes = [rows for (who, _), rows in runs.items() if who == name]
        ends = torch.tensor([[r.losses[-1] for r in rows] for rows in sizes]).T
        wrong = torch.tensor([[100 * r.wrong for r in rows] for rows in sizes]).T
        losses.append(Curve(name, [float(rows[0].trained) for rows in sizes], ends))
        errors.append(Curve(name, [rows[0].state / 1e3 for rows in sizes], wrong))
    return [
        Panel(f"rank {RANK}", "step", "test loss", way, xlog=False),
        Panel("the end, by rank", "numbers trained", "test loss", losses, xlog=True),
        Panel("the end, by rank", "kilobytes of optimizer state", "test error, %", errors,
              xlog=True),
        Panel(f"where training begins, rank {RANK}", "learning rate",
              "test loss / the model's", starts, xlog=True),
    ]  # fmt: skip


def _sizes(task: _Task, runs: Runs) -> list[Check]:
    shapes = [m.weight.shape for m in task.start.blocks.modules() if isinstance(m, nn.Linear)]
    ours, lora_, full = (runs[name, RANK][0] for name in (SIGN, "LoRA", "full"))
    return [
        Check.near("LoRA-SB trains r^2 numbers per layer", ours.trained, RANK**2 * len(shapes),
                   0.0),
        Check.near("LoRA r (m + n)", lora_.trained, RANK * sum(m + n for m, n in shapes), 0.0),
        Check.near("optimizer state of LoRA-SB, to that of full fine-tuning, is as the numbers "
                   "that are trained", ours.state / full.state, ours.trained / full.trained, 0.01,
                   basis="derived"),
    ]  # fmt: skip


def _starting(starts: list[Curve], rates: dict[str, float]) -> list[Check]:
    checks = []
    for curve in starts:
        rate, name = rates[curve.label], f"{curve.label}, "
        levels = [_middle(column) for column in curve.values.T.tolist()]
        least = min(range(len(levels)), key=levels.__getitem__)
        checks += [
            Check.below(
                name + f"lr {rate:g}: training begins a step of full fine-tuning on, with less "
                "loss than the model's (ratio)",
                levels[_LATENT.index(rate)], 1.0, basis="derived",
                why="that learning rate is best for training, but this step of it, "
                f"lr / ({WARMUP:g} steps), is too long",
            ),
            Check.below(name + f"lr {_LATENT[least]:g}, the best to begin with: it does",
                        levels[least], 1.0, basis="derived"),
        ]  # fmt: skip
    return checks


def _ends(runs: Runs) -> list[Check]:
    def end(name: str, rank: int = RANK) -> float:
        return _middle([r.losses[-1] for r in runs[name, rank]])

    def fewer(rank: int, than: int) -> str:
        return f"1/{runs['LoRA', than][0].trained / runs[SIGN, rank][0].trained:.0f}"

    what = "test loss at the end, ratio of medians"
    checks = [
        Check.below(f"LoRA-SB (sign) is ahead of LoRA-XS at rank {RANK}: {what}",
                    end(SIGN) / end("LoRA-XS"), 1.0, basis="recalled",
                    why="the sign gives every entry of the gradient the same size, noise as well; "
                    "with the gradient itself it is ahead"),
        Check.below("LoRA-SB (raw) is ahead of LoRA-XS", end(RAW) / end("LoRA-XS"), 1.0,
                    basis="recalled"),
        Check.below("raw instead of sign: ahead (first gradient of 256 samples)",
                    end(RAW) / end(SIGN), 1.0, basis="derived"),
    ]  # fmt: skip
    # The paper gives LoRA-SB three times the rank of LoRA.
    pairs: list[tuple[int, int, Basis]] = [(16, 4, "paper"), (RANK, RANK, "derived")]
    for rank, than, basis in pairs:
        for name in (SIGN, RAW):
            claim = f"{name}, rank {rank}, with {fewer(rank, than)} of the numbers of LoRA of "
            checks.append(
                Check.below(f"{claim}rank {than} is better than it", end(name, rank)
                            / end("LoRA", than), 1.0, basis=basis, why=MORE)
            )  # fmt: skip
    checks.append(
        Check.above("full fine-tuning is not beaten (LoRA-SB, raw, to it)", end(RAW) / end("full"),
                    1.0, basis="recalled")
    )  # fmt: skip
    return checks


def _notes(rates: dict[str, float], runs: Runs) -> str:
    rows = []
    for name, rate in rates.items():
        here = runs[name, RANK]
        rows.append(
            f"{name} (lr {rate:g}): {here[0].trained:,} numbers, {here[0].state / 1e3:,.1f} KB of "
            f"optimizer state, loss {_middle([r.losses[-1] for r in here]):.3f}, error "
            f"{100 * _middle([r.wrong for r in here]):.1f} %"
        )
    return (
        f"At rank {RANK}, medians of the test data: {'; '.join(rows)}. Of each method the best of "
        "four learning rates by training loss, on a run that is not among those shown, at rank "
        f"{RANK}; other ranks take it over."
    )


EXPERIMENT = Experiment(
    "lora-transformer",
    "A small transformer: LoRA, LoRA-XS, LoRA-SB and full fine-tuning",
    ("2411.19557", "2405.17604"),
    "A transformer of two layers (width 64) that reads digits as they are, fine-tuned to read them "
    "turned by 90 degrees and inverted: all 12 linear layers of its blocks, embedding and head "
    "frozen but in full fine-tuning. 200 steps of AdamW without decay, batches of 32, warm-up over "
    "2 % and linear decay as in the paper; LoRA-SB's first gradient is that of 256 samples.",
    run,
)
