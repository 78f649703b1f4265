"""One rank: measures the network, times a step of every contestant in turn, trains with each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..training import Training
from .contestants import Contestant, TimedState, contestant
from .workloads import WORKLOADS


@dataclass
class Task:
    """What the launcher asks for; it travels as JSON in PYSMOOTH_COMM_TASK."""

    workload: str
    contestants: list[str]
    rounds: int
    interface: str
    quality_steps: int
    out: str


def _sent(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


class Run:
    """A training under one contestant."""

    def __init__(self, training: Training, contestant: Contestant, group: Any = None) -> None:
        self.training = training
        self.model: nn.Module = training.make_model()
        # Without momentum: behind a hook it would multiply what compression adds.
        self.lr = training.lr / (1 - training.momentum) * contestant.lr_scale
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)
        self.ddp = self.model
        self.backward = 0.0  # seconds of the last one
        self.hook: object = None
        if contestant.register is not None:
            self.ddp = DistributedDataParallel(
                self.model, process_group=group, bucket_cap_mb=contestant.bucket_mb
            )
            self.hook = contestant.register(self.ddp, self.optimizer)

    def step(self, number: int, left: float = 1.0) -> Tensor:
        """One step on this rank's batch, at so much of the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.lr * left
        x, y = self.training.batch(number * dist.get_world_size() + dist.get_rank())
        self.optimizer.zero_grad()
        loss = self.training.loss(self.ddp, x, y)
        start = time.perf_counter()
        torch.autograd.backward(loss)
        self.backward = time.perf_counter() - start
        self.optimizer.step()
        return loss.detach()

    def held_out(self) -> float:
        """The loss on 32 batches that nobody trained on before."""
        with torch.no_grad():
            batches = (self.training.batch(10_000_000 + i) for i in range(32))
            losses = [self.training.loss(self.model, x, y).item() for x, y in batches]
        return sum(losses) / len(losses)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _slowest(times: list[float]) -> list[float]:
    """Per round, the time of the slowest rank."""
    all_times = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(all_times, dist.ReduceOp.MAX)
    return [float(t) for t in all_times]


def _timed(call: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def network(numel: int) -> list[dict[str, float]]:
    """Seconds of sums over all ranks, of small and of all gradients."""
    rows = []
    for size in (1, 1024, 65536, numel // 4, numel):
        x = torch.zeros(size)
        times = [_timed(lambda x=x: dist.all_reduce(x)) for _ in range(5)]  # type: ignore[misc]
        rows.append({"bytes": 4.0 * size, "seconds": _median(_slowest(times))})
    return rows


def race(task: Task, training: Training) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of a step, all contestants in turn; "alone" does not communicate."""
    runs = {"alone": Run(training, Contestant(None))}
    runs |= {name: Run(training, contestant(name)) for name in task.contestants}
    # What a hook costs where nothing has to travel: a group of one rank each.
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    solo = {name: Run(training, contestant(name), own) for name in task.contestants}
    times: dict[str, list[float]] = {name: [] for name in runs}
    solo_times: dict[str, list[float]] = {name: [] for name in solo}
    backward: list[float] = []
    worked: dict[str, list[float]] = {
        name: [] for name, run in runs.items() if isinstance(run.hook, TimedState)
    }
    sent: dict[str, list[int]] = {name: [] for name in runs}
    names = list(runs)
    warmup = 4  # buckets are made anew after the first step; PowerSGD begins in the third
    for turn in range(warmup + task.rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            dist.barrier()
            before = _sent(task.interface)
            seconds = _timed(lambda run=runs[name], n=turn: run.step(n))  # type: ignore[misc]
            dist.barrier()
            after = _sent(task.interface)
            if turn >= warmup:
                times[name].append(seconds)
                sent[name].append(after - before)
                if name == "alone":
                    backward.append(runs[name].backward)
            hook = runs[name].hook
            if isinstance(hook, TimedState):
                seconds = hook.take_seconds()
                if turn >= warmup:
                    worked[name].append(seconds)
            if name in solo:
                seconds = _timed(lambda run=solo[name], n=turn: run.step(n))  # type: ignore[misc]
                if turn >= warmup:
                    solo_times[name].append(seconds)
    backward = _slowest(backward)
    quiet = _median([float(x) for x in sent["alone"]])  # the barriers
    found: dict[str, dict[str, Any]] = {}
    for name in runs:
        slowest = _slowest(times[name])
        found[name] = {
            "seconds": slowest,
            "sent": _median([float(x) for x in sent[name]]) - quiet,
        }
        if name == "alone":
            found[name]["backward_seconds"] = backward
        if name in solo:
            found[name]["solo_seconds"] = _slowest(solo_times[name])
        if name in worked:
            found[name]["worked_seconds"] = _slowest(worked[name])
    return found


def quality(task: Task, training: Training) -> dict[str, dict[str, Any]]:
    """Losses along a training with each contestant, and on data held out at its end.

    The learning rate falls to 0 in a line, so that the last loss is not that of one step.
    """
    found = {}
    for name in task.contestants:
        run = Run(training, contestant(name))
        losses = torch.stack(
            [
                run.step(step, left=1 - step / task.quality_steps)
                for step in range(task.quality_steps)
            ]
        )
        dist.all_reduce(losses)
        mean = (losses / dist.get_world_size()).tolist()
        found[name] = {"lr": run.lr, "losses": mean, "held_out": run.held_out()}
    return found


def main() -> None:
    """Does the task that the environment describes; rank 0 writes what was found."""
    task = Task(**json.loads(os.environ["PYSMOOTH_COMM_TASK"]))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training = WORKLOADS[task.workload].make()
    numel = sum(p.numel() for p in training.make_model().parameters())
    found: dict[str, Any] = {"numel": numel}
    if task.rounds > 0:
        found["network"] = network(numel)
        found["race"] = race(task, training)
    if task.quality_steps > 0:
        found["quality"] = quality(task, training)
    if dist.get_rank() == 0:
        Path(task.out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
