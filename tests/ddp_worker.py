"""What the ranks of test_ddp_hooks.py do."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysmooth
from pysmooth import compressors
from pysmooth.distributed import (
    DCSGD,
    EF14,
    EF21,
    Clip21SGD2M,
    CompressedState,
    DSignSGD,
    MajorityVote,
    Method,
    MismatchError,
    TwoWaySign,
    compressed_hook,
)

LR, STEPS = 0.05, 6
TOP = compressors.TopK(ratio=0.1)
METHODS: dict[str, Method] = {
    "dsign": DSignSGD(),
    "majority": MajorityVote(),
    "two-way": TwoWaySign(),
    "dcsgd rand-k": DCSGD(compressors.RandK(ratio=0.2, seed=3)),
    "dcsgd qsgd": DCSGD(compressors.QSGD(levels=7)),
    "dcsgd natural": DCSGD(compressors.NaturalCompression()),
    "ef14 top-k": EF14(TOP),
    "ef14 sign, momentum": EF14(compressors.ScaledSign(), momentum=0.9),
    "ef21 top-k": EF21(TOP),
    "ef21 sgdm": EF21(TOP, eta=0.4),
    "ef21 sgd2m, zero": EF21(TOP, eta=0.4, momenta=2, init="zero"),
    "ef21 full": EF21(TOP, eta=0.4, init="full"),
    "clip21": Clip21SGD2M(0.5, beta=0.3, beta_hat=0.5),
    "clip21 noise": Clip21SGD2M(0.5, beta=0.3, beta_hat=0.5, noise_std=0.1),
}


def make_model() -> nn.Module:
    """Some layers; also one that is a channels_last convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Tanh(), nn.Linear(8 * 36, 40), nn.Linear(40, 5)
    )
    return model.to(memory_format=torch.channels_last)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """A rank's data."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 3, 8, 8, generator=g), torch.randint(5, (4,), generator=g)


class Pair(nn.Module):
    """Two layers by name."""

    def __init__(self, names: str, size: int = 20) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(192 if name == names[0] else size, size))

    def forward(self, x: Tensor) -> Tensor:
        """One behind the other."""
        for layer in self.children():
            x = layer(x.flatten(1).to(layer.weight.dtype))
        return x


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """Cross entropy on it."""
    x, y = batch(rank, step)
    return nn.functional.cross_entropy(model(x), y)


class Job:
    """A model on its way under a hook."""

    def __init__(
        self,
        method: Method,
        *,
        lr: float = LR,
        model: nn.Module | None = None,
        ddp: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = make_model() if model is None else model
        # Buckets of 4 KB: several, and put together anew after the first step.
        self.ddp = DistributedDataParallel(self.model, **{"bucket_cap_mb": 0.004, **(ddp or {})})
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.state = CompressedState(
            self.ddp, self.optimizer, method, **{"dense_below": 8, **kwargs}
        )
        self.ddp.register_comm_hook(self.state, compressed_hook)

    def optimize(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        """With another optimizer than SGD."""
        self.optimizer = self.state._optimizer = make(self.model.parameters())
        self.optimizer.register_step_post_hook(lambda *_: self.state._stepped())

    def step(self, number: int) -> None:
        """One step."""
        self.optimizer.zero_grad()
        loss_of(self.ddp, dist.get_rank(), number).backward()
        self.optimizer.step()

    def params(self) -> list[Tensor]:
        """Parameters as they are."""
        return [p.detach().clone() for p in self.model.parameters()]


def methods(found: dict[str, Any]) -> None:
    """Every method for some steps; the rate changes on the way."""
    for name, method in METHODS.items():
        job = Job(method)
        for step in range(STEPS):
            job.optimizer.param_groups[0]["lr"] = LR if step < 3 else LR / 10
            job.step(step)
        found[name] = job.params()
        found[f"{name} sent"] = job.state.sent_bytes


def resumed(found: dict[str, Any]) -> None:
    """Saved after three steps, loaded into a new model and hook, and on."""
    for name in ("two-way", "ef14 sign, momentum", "ef21 sgdm", "clip21 noise"):
        job = Job(METHODS[name])
        for step in range(3):
            job.step(step)
        saved = job.state.state_dict(), job.model.state_dict()
        again = Job(METHODS[name])
        again.state.load_state_dict(saved[0])
        again.model.load_state_dict(saved[1])
        for step in range(3, 6):
            job.step(step)
            again.step(step)
        found[f"resumed {name}"] = all(
            torch.equal(a, b) for a, b in zip(job.params(), again.params(), strict=True)
        )


def accumulated(found: dict[str, Any]) -> None:
    """Two backwards, the first without communication; and a model that takes their sum at once."""
    job, whole = Job(EF14(TOP)), Job(EF14(TOP))
    rank = dist.get_rank()
    for step in range(4):
        job.optimizer.zero_grad()
        with job.ddp.no_sync():
            loss_of(job.ddp, rank, 2 * step).backward()
        loss_of(job.ddp, rank, 2 * step + 1).backward()
        job.optimizer.step()
        whole.optimizer.zero_grad()
        both = loss_of(whole.ddp, rank, 2 * step) + loss_of(whole.model, rank, 2 * step + 1)
        both.backward()
        whole.optimizer.step()
    found["accumulated"] = [job.params(), whole.params()]


def not_finite(found: dict[str, Any]) -> None:
    """A NaN on one rank: NaN everywhere, residuals as they were; then on as if nothing was."""
    job, calm = Job(EF14(TOP)), Job(EF14(TOP))
    for it in (job, calm):
        it.optimize(lambda params: pysmooth.ClipSGD(params, LR, nonfinite="skip"))
    for step in range(4):
        if step == 2:
            job.optimizer.zero_grad()
            weight = float("nan") if dist.get_rank() == 0 else 1.0
            (loss_of(job.ddp, 0, 99) * weight).backward()
            grads = [p.grad for p in job.model.parameters() if p.numel() >= 8]
            found["nan everywhere"] = all(bool(g.isnan().all()) for g in grads if g is not None)
            job.optimizer.step()
        job.step(step)
        calm.step(step)
    found["after nan"] = [job.params(), calm.params(), job.state.dropped]


def scaled(found: dict[str, Any]) -> None:
    """A GradScaler whose scale changes, against none: powers of two, so to the bit."""
    job, calm = Job(EF14(TOP)), Job(EF14(TOP))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    job.state._scaler = scaler
    for step in range(5):
        job.optimizer.zero_grad()
        scaler.scale(loss_of(job.ddp, dist.get_rank(), step)).backward()
        scaler.step(job.optimizer)
        scaler.update()
        calm.step(step)
    found["scaled"] = [job.params(), calm.params(), scaler.get_scale()]


def warmed_up(found: dict[str, Any]) -> None:
    """Dense first steps are those of plain DistributedDataParallel; a rate of 0 moves nothing."""
    job = Job(EF21(TOP), warmup_steps=3)
    plain = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for step in range(3):
        job.step(step)
        optimizer.zero_grad()
        loss_of(plain, dist.get_rank(), step).backward()
        optimizer.step()
    found["warm"] = [job.params(), [p.detach().clone() for p in plain.parameters()]]
    job = Job(EF14(TOP))
    job.step(0)
    before = {s.name: s.states["residual"].clone() for s in job.state._slots if s.states}
    at = job.params()
    job.optimizer.param_groups[0]["lr"] = 0.0
    job.step(1)
    after = {s.name: s.states["residual"] for s in job.state._slots if s.states}
    found["rate 0"] = (
        all(torch.equal(a, b) for a, b in zip(at, job.params(), strict=True))
        and before.keys() == after.keys()
        and all(torch.equal(before[name], after[name]) for name in before)
    )


def void(found: dict[str, Any]) -> None:
    """A backward that no step follows is as if it had not been."""
    job, calm = Job(TwoWaySign()), Job(TwoWaySign())
    for step in range(4):
        if step == 2:
            loss_of(job.ddp, dist.get_rank(), 50).backward()
        job.step(step)
        calm.step(step)
    found["void"] = [job.params(), calm.params(), job.state.dropped]


def mismatched(found: dict[str, Any]) -> None:
    """Ranks that mean other things hear of it before anything is sent: what is told, by case."""
    first = dist.get_rank() == 0
    top, rate = compressors.TopK(ratio=0.1 if first else 0.2), LR if first else 2 * LR
    scaler = torch.amp.GradScaler("cpu") if first else None
    half = torch.float16 if first else torch.bfloat16
    # Buckets as they are from the first backward on.
    unused, cap = {"find_unused_parameters": True}, {"bucket_cap_mb": 0.004 if first else 25}
    cases: dict[str, Callable[[], Job]] = {
        "compressor": lambda: Job(EF14(top)),
        "seed": lambda: Job(DCSGD(compressors.QSGD(levels=7, seed=int(first)))),
        "method": lambda: Job(EF14(TOP) if first else EF21(TOP)),
        "dense_below": lambda: Job(EF14(TOP), dense_below=8 if first else 9),
        "warm-up": lambda: Job(EF14(TOP), warmup_steps=int(first)),
        "scaler": lambda: Job(EF14(TOP), scaler=scaler),
        "rate": lambda: Job(EF14(TOP), lr=rate),
        "rate of 0": lambda: Job(EF14(TOP), lr=LR if first else 0.0),
        "buckets": lambda: Job(EF14(TOP), model=Pair("ab", 600), ddp=unused if first else {}),
        "last buckets": lambda: Job(EF14(TOP), model=Pair("ab", 600), ddp=unused | cap),
        "names": lambda: Job(EF14(TOP), model=Pair("ab" if first else "cd")),
        "order": lambda: Job(EF14(TOP), model=Pair("ab" if first else "ba", 192)),
        "dtype": lambda: Job(EF14(TOP), model=Pair("ab").to(half)),
        "shape": lambda: Job(EF14(TOP), model=Pair("ab", 20 + first), ddp={"init_sync": False}),
    }
    for name, make in cases.items():
        try:
            job = make()
            job.step(0)
        except MismatchError as error:
            found[f"mismatch: {name}"] = str(error)
            assert job.state.steps == 0, name
            assert not any(slot.states for slot in job.state._slots), name
        except RuntimeError as error:  # torch's own
            found[f"mismatch: {name}"] = str(error)
    job = Job(DSignSGD(), lr=rate)
    for step in range(3):
        job.step(step)  # each rank may step as far as it likes
    for name, later in (("rate", rate), ("rate of 0", LR if first else 0.0)):
        job = Job(METHODS["ef14 top-k"])
        for step in range(3):
            job.step(step)
        before = job.state.state_dict()
        job.optimizer.param_groups[0]["lr"] = later
        try:
            job.step(3)
        except MismatchError as error:
            found[f"mismatch: {name}, later"] = str(error)
        after = job.state.state_dict()
        assert after["steps"] == before["steps"] == 3
        for slot, states in before["states"].items():
            for key, value in states.items():
                assert torch.equal(
                    torch.as_tensor(after["states"][slot][key]), torch.as_tensor(value)
                )


def changed_world(found: dict[str, Any]) -> None:
    """States of another number of ranks: the stated rule."""
    for name in ("ef14 top-k", "ef21 top-k"):
        job = Job(METHODS[name])
        for step in range(2):
            job.step(step)
        saved = [job.state.state_dict()]
        dist.broadcast_object_list(saved, src=0)
        foreign = {**saved[0], "world_size": 7}
        job.state.load_state_dict(foreign)
        slots = job.state._slots
        if name.startswith("ef14"):
            found["regrouped ef14"] = all(not slot.states for slot in slots)
        else:
            found["regrouped ef21"] = all(
                torch.equal(slot.states["estimate"], slot.states["mean_estimate"])
                for slot in slots
                if slot.states
            )
        job.step(2)
        found[f"after {name}"] = job.params()
        try:
            job.state.load_state_dict({**foreign, "method": "EF0()"})
        except ValueError as error:
            found["other method"] = str(error)


def bfloat16(found: dict[str, Any]) -> None:
    """Gradients of 16 bits: messages stay float32."""
    model = make_model().to(torch.bfloat16)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    state = CompressedState(ddp, optimizer, EF14(TOP))
    ddp.register_comm_hook(state, compressed_hook)
    x, y = batch(dist.get_rank(), 0)
    nn.functional.cross_entropy(ddp(x.bfloat16()), y).backward()
    optimizer.step()
    found["bfloat16"] = all(bool(p.isfinite().all()) for p in model.parameters())


def run(rank: int, ranks: int, port: int, folder: str) -> None:
    """One rank: everything, and what it found, into a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=limit)
    found: dict[str, Any] = {}
    try:
        for task in (methods, resumed, accumulated, not_finite, scaled, warmed_up, void):
            task(found)
        for task in (changed_world, bfloat16, mismatched):
            task(found)
    finally:
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
