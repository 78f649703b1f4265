"""Of R the mean over clients is the mean of the models; of LoRA's two factors it is not."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pysmooth import peft
from pysmooth.federated import FedAvg, ModelClient, Server

from ..digits import DigitReader, batches, digits, loss, pretrained
from ..lora import LoraLinear, lora
from ..outcome import Check, Config, Curve, Experiment, Outcome, Panel

RANK, CLIENTS, BATCH = 8, 5, 32
OPTIONS: dict[str, Any] = {"targets": DigitReader.TARGETS, "train": ("head",)}


def _adapted(model: DigitReader, name: str) -> nn.Module:
    model = copy.deepcopy(model)
    if name == "LoRA":
        return lora(model, RANK, torch.Generator().manual_seed(2), **OPTIONS)
    first = batches(digits(turned=True).train, 256, 1, torch.Generator().manual_seed(2))
    return peft.lora_sb(model, loss, first, rank=RANK, step=0.1, init_grad="raw", **OPTIONS)


def _deltas(model: nn.Module) -> list[Tensor]:
    """What is added to the weight of every adapted layer, in float64."""
    with torch.no_grad():
        return [layer.delta() for layer in peft.adapters(model)] + [
            m.b.double() @ m.a.double() for m in model.modules() if isinstance(m, LoraLinear)
        ]


class _Race(NamedTuple):
    losses: list[float]
    aside: list[float]  # the model of the mean from the mean of the models, to the latter
    numbers: int  # that a client sends in a round
    averaged: float  # the same, of average_adapters


def _race(config: Config, label: str, model: nn.Module, rounds: int, seed: int) -> _Race:
    data, entropy = digits(turned=True), nn.functional.cross_entropy
    view = ModelClient(copy.deepcopy(model), entropy, *data.test)
    owners = {}
    for i in range(CLIENTS):  # two digits of ten each
        own = torch.isin(data.train[1], torch.tensor([2 * i, 2 * i + 1]))
        mine = data.train[0][own], data.train[1][own]
        owners[i] = ModelClient(copy.deepcopy(model), entropy, *mine)
    steps = config.of(5, 3)
    method = FedAvg(lr=0.1, local_steps=steps, batch_size=BATCH, by_samples=False, seed=seed)
    server = Server(method, view.vector())

    def test() -> float:
        with torch.no_grad():
            return float(loss(view.model, data.test))

    def distance(deltas: list[Tensor], middle: list[Tensor]) -> float:
        apart = sum(float((a - b).square().sum()) for a, b in zip(deltas, middle, strict=True))
        return float((apart / sum(float(b.square().sum()) for b in middle)) ** 0.5)

    losses, aside, averaged = [test()], [], 0.0
    models: list[nn.Module] = [owner.model for owner in owners.values()]
    middle: list[Tensor] = []
    for _ in config.steps(rounds, f"{label}, run {seed + 1}"):
        x, uploads = server.x.clone(), server.uploads()
        for i, owner in owners.items():
            answer = method.reply(server.task(i), (x,), owner)
            server.take(uploads, i, answer)
            owner.load(x - answer[0])  # where the client is now
        server.finish(uploads, CLIENTS)
        view.load(server.x)
        middle = [torch.stack(layers).mean(0) for layers in zip(*map(_deltas, models), strict=True)]
        aside.append(distance(_deltas(view.model), middle))
        losses.append(test())
    if label != "LoRA":
        state = peft.average_adapters([peft.adapter_state(m) for m in models])
        averaged = distance(_deltas(peft.load_adapter_state(models[0], state)), middle)
    return _Race(losses, aside, len(server.x), averaged)


def run(config: Config) -> Outcome:
    """The same clients, LoRA-SB or LoRA on the same model."""
    rounds, model = config.of(15, 2), pretrained(config.of(300, 10))
    races = {
        name: [
            _race(config, name, _adapted(model, name), rounds, seed)
            for seed in range(config.runs(3, 1))
        ]
        for name in ("LoRA-SB", "LoRA")
    }
    places = [float(i + 1) for i in range(rounds)]
    aside = {n: Curve(n, places, torch.tensor([r.aside for r in rs])) for n, rs in races.items()}
    sent = [
        Curve(n, [4e-3 * rs[0].numbers * i for i in (0.0, *places)],
              torch.tensor([r.losses for r in rs]))
        for n, rs in races.items()
    ]  # fmt: skip
    ours, theirs = races["LoRA-SB"], races["LoRA"]
    shapes = [m.weight.shape for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    head = sum(p.numel() for p in model.head.parameters())
    checks = [
        Check.below("LoRA-SB: the model of the mean is the mean of the models, to rounding: "
                    "largest distance, to the mean", float(aside["LoRA-SB"].values.max()), 1e-6,
                    basis="paper"),
        Check.below("the same of average_adapters", max(r.averaged for r in ours), 1e-6),
        Check.above("LoRA: it is not: least distance", float(aside["LoRA"].values.min()), 1e-3),
        Check.near("a client of LoRA-SB sends r^2 numbers per layer, and the head",
                   ours[0].numbers, RANK**2 * len(shapes) + head, 0.0),
        Check.near("one of LoRA r (m + n), and the head", theirs[0].numbers,
                   RANK * sum(m + n for m, n in shapes) + head, 0.0),
    ]  # fmt: skip
    if not config.quick:
        checks.append(
            Check.below("LoRA-SB learns from what is sent: test loss, to that at first",
                        max(r.losses[-1] / r.losses[0] for r in ours), 0.5, basis="derived")
        )  # fmt: skip
    panels = [
        Panel("what the mean of what is sent misses", "round",
              "distance from the mean of the models", list(aside.values())),
        Panel("test loss", "kilobytes sent by a client", "loss", sent),
    ]  # fmt: skip
    return Outcome(panels, checks)


EXPERIMENT = Experiment(
    "lora-sb-federated",
    "Averaging R over clients is exact",
    ("2502.15436", "2411.19557"),
    "A transformer of two layers that reads digits as they are, to read them turned by 90 degrees "
    "and inverted; 5 clients with two digits each, FedAvg with 5 local steps of lr 0.1, batches "
    "of 32, rank 8, LoRA-SB from the raw gradient. Distances are of scale B R A, all layers "
    "together, in float64.",
    run,
)
