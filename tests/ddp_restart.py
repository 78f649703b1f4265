"""A training that a SIGKILL meets in mid-step; test_ddp_restart.py starts it by torchrun."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ddp_worker import METHODS, Job
from torch import Tensor

import pysmooth
from pysmooth.distributed import CompressedState

STEPS, EVERY, KILLED = 7, 2, 5
NAMES = ("ef14 sign, momentum", "ef21 sgdm")


def make() -> list[Job]:
    """A job for each method."""
    jobs = [Job(METHODS[name]) for name in NAMES]
    for job in jobs:
        job.optimize(lambda params: pysmooth.ClipSGD(params, 0.05, momentum=0.9, max_norm=1.0))
    return jobs


def kept(state: CompressedState) -> dict[str, Tensor]:
    """What a hook keeps, and its counts."""
    saved = state.state_dict()
    flat = {
        f"{name} {key}": torch.as_tensor(value)
        for name, states in saved["states"].items()
        for key, value in states.items()
    }
    return flat | {"steps": torch.tensor(saved["steps"])}


def snapshot(job: Job) -> dict[str, Tensor]:
    """Everything that a step may change."""
    params = {f"param {i}": p for i, p in enumerate(job.params())}
    momenta = {
        f"momentum {i}": s["momentum_buffer"].clone()
        for i, s in enumerate(job.optimizer.state.values())
    }
    return {**params, **momenta, **kept(job.state)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(folder: Path, jobs: list[Job], step: int) -> None:
    """This rank's checkpoint, there as a whole or not at all."""
    saved = [
        {
            "model": job.model.state_dict(),
            "optimizer": job.optimizer.state_dict(),
            "hook": job.state.state_dict(),
        }
        for job in jobs
    ]
    path = folder / f"step{step}-rank{dist.get_rank()}.pt"
    torch.save(saved, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def load(folder: Path, jobs: list[Job]) -> int:
    """The last checkpoint that all ranks have: the step to go on with; 0 where there is none."""
    dist.barrier()
    ranks = dist.get_world_size()
    steps = [n for n in range(STEPS) if len(list(folder.glob(f"step{n}-rank*.pt"))) == ranks]
    if not steps:
        return 0
    saved = torch.load(folder / f"step{steps[-1]}-rank{dist.get_rank()}.pt", weights_only=True)
    for job, states in zip(jobs, saved, strict=True):
        job.model.load_state_dict(states["model"])
        job.optimizer.load_state_dict(states["optimizer"])
        job.state.load_state_dict(states["hook"])
    return steps[-1]


def doomed(job: Job, number: int) -> None:
    """A step in which rank 1 dies, when the last layers' gradients have been sent already."""

    def die(grad: Tensor) -> None:
        assert job.state._thread is not None
        job.state._thread.submit(lambda: None).result()
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        next(job.model.parameters()).register_hook(die)
    job.step(number)


def first_life(folder: Path) -> None:
    """Trains until rank 1 dies; what the others then have is what they had before the step."""
    jobs = make()
    for step in range(STEPS):
        jobs[0].step(step)
        if step < KILLED:
            jobs[1].step(step)
            if (step + 1) % EVERY == 0:
                save(folder, jobs, step + 1)
            continue
        before = [snapshot(job) for job in jobs]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; there is something to say first
        found: dict[str, Any] = {"error": ""}
        try:
            doomed(jobs[1], step)
        except RuntimeError as error:
            found["error"] = str(error)
        sent = [s for s in jobs[1].state._slots if s.touched]
        found["staged"] = [s.name for s in sent]  # of the buckets that got through
        found["unchanged"] = [same(a, snapshot(b)) for a, b in zip(before, jobs, strict=True)]
        jobs[1].optimizer.zero_grad()
        jobs[1].optimizer.step()  # of one who caught the error and went on: no gradients, no step
        found["after step"] = same(before[1], snapshot(jobs[1]))
        torch.save(found, folder / "survivor.pt")
        os._exit(1)


def second_life(folder: Path) -> None:
    """On from the checkpoint; and all steps anew, without interruption."""
    jobs = make()
    first = load(folder, jobs)
    for step in range(first, STEPS):
        for job in jobs:
            job.step(step)
    calm = make()
    for step in range(STEPS):
        for job in calm:
            job.step(step)
    found = {
        "from": first,
        "same": [same(snapshot(a), snapshot(b)) for a, b in zip(jobs, calm, strict=True)],
        "names": list(snapshot(jobs[1])),
    }
    torch.save(found, folder / f"done{dist.get_rank()}.pt")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        first_life(folder)
    second_life(folder)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo do not always outlive the interpreter's end in peace


if __name__ == "__main__":
    main()
