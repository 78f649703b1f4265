"""What the ranks of test_fsdp_hooks.py do: FSDP2 under hooks."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddp_worker
import torch
import torch.distributed as dist
from ddp_worker import LR, METHODS, STEPS, TOP, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pysmooth import compressors
from pysmooth.distributed import (
    EF14,
    Clip21SGD2M,
    DSignSGD,
    compress_all_reduce,
    compress_reduce_scatter,
)

Reduction = Callable[..., Any]
ALL_REDUCED = [name for name in METHODS if not name.startswith("clip21")]
SCATTERED = [name for name in ALL_REDUCED if not METHODS[name].two_phase]
UNDER_DDP = ["dcsgd rand-k", "two-way", "ef14 sign, momentum", "ef21 full"]


def make_model() -> nn.Module:
    """FSDP2 takes contiguous parameters only."""
    return ddp_worker.make_model().to(memory_format=torch.contiguous_format)


def mesh_of(outer: int) -> DeviceMesh:
    """Of all ranks, the outer dimension so long."""
    shape = (outer, dist.get_world_size() // outer)
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))


class Job:
    """A sharded model on its way, one module by itself.

    Without a mesh over all ranks, their reduction compressed; with one over its inner dimension, or
    over both (`hybrid` tells which of the two reductions are compressed).
    """

    def __init__(
        self, method: Any, mesh: DeviceMesh | None, *, hybrid: str = "", **kwargs: Any
    ) -> None:
        self.model = make_model()
        kwargs = {"dense_below": 8, **kwargs}
        policy = {"mp_policy": kwargs.pop("policy", MixedPrecisionPolicy())}
        if mesh is None:
            line = init_device_mesh("cpu", (dist.get_world_size(),))
        else:
            line = mesh if hybrid else mesh["inner"]
        fully_shard(self.model[3], mesh=line, **policy)  # type: ignore[index]
        fully_shard(self.model, mesh=line, **policy)
        make = kwargs.pop("make", torch.optim.SGD)
        self.optimizer = make(self.model.parameters(), lr=kwargs.pop("lr", LR))
        if mesh is None or hybrid in ("reduce-scatter", "both"):
            self.state: Any = compress_reduce_scatter(self.model, self.optimizer, method, **kwargs)
        if mesh is not None and hybrid in ("", "all-reduce", "both"):
            group = mesh.get_group("outer")
            self.state = compress_all_reduce(
                self.model, self.optimizer, method, process_group=group, **kwargs
            )

    def step(self, number: int, *, factor: float = 1.0) -> None:
        """One step."""
        self.optimizer.param_groups[0]["lr"] *= 1.0 if number < 3 else 0.5
        self.optimizer.zero_grad()
        (factor * loss_of(self.model, dist.get_rank(), number)).backward()
        self.optimizer.step()

    def params(self) -> list[Tensor]:
        """Whole parameters as they are."""
        return [p.full_tensor().detach().clone() for p in self.model.parameters()]


def trained(
    found: dict[str, Any], mesh: DeviceMesh | None, names: list[str], hybrid: str = ""
) -> None:
    """Methods for some steps."""
    for name in names:
        job = Job(METHODS[name], mesh, hybrid=hybrid)
        for step in range(STEPS):
            job.step(step)
        found[name] = job.params()
        found[f"{name} sent"] = job.state.sent_bytes
        assert job.state.steps == STEPS
        assert job.state.dropped == 0


def under_ddp(found: dict[str, Any]) -> None:
    """The same under DistributedDataParallel's hook."""
    for name in UNDER_DDP:
        job = ddp_worker.Job(METHODS[name], model=make_model())
        for step in range(STEPS):
            job.optimizer.param_groups[0]["lr"] *= 1.0 if step < 3 else 0.5
            job.step(step)
        found[f"ddp {name}"] = job.params()


def resumed(found: dict[str, Any], mesh: DeviceMesh | None) -> None:
    """Saved after two steps, loaded into a new model, and on."""
    for name in ("ef14 sign, momentum", "ef21 full"):
        job = Job(METHODS[name], mesh)
        for step in range(2):
            job.step(step)
        saved = job.state.state_dict()
        local = [p.to_local().detach().clone() for p in job.model.parameters()]
        other = Job(METHODS[name], mesh)
        for p, q in zip(other.model.parameters(), local, strict=True):
            p.to_local().detach().copy_(q)
        other.state.load_state_dict(saved)
        for both in (job, other):
            both.step(2)
        same = all(map(torch.equal, job.params(), other.params()))
        found[f"resumed {name}"] = same and other.state.steps == 3


def moved(found: dict[str, Any]) -> None:
    """A state of another number of ranks: the method begins anew, as in a new job."""
    for name in ("ef14 sign, momentum", "ef21 full"):
        job, fresh = Job(METHODS[name], None), Job(METHODS[name], None)
        for step in range(2):
            job.step(step)
        saved = job.state.state_dict() | {"world_size": 1 + dist.get_world_size()}
        job.state.load_state_dict(saved)
        for p, q in zip(fresh.model.parameters(), job.model.parameters(), strict=True):
            p.to_local().detach().copy_(q.to_local().detach())
        for both in (job, fresh):
            both.step(2)
        same = all(map(torch.equal, job.params(), fresh.params()))
        found[f"moved {name}"] = same and (job.state.steps, fresh.state.steps) == (3, 1)


def void_steps(found: dict[str, Any], mesh: DeviceMesh | None, hybrid: str = "") -> None:
    """A NaN on one rank, in its first rows alone; and a backward that no step follows."""
    job, calm = Job(EF14(TOP), mesh, hybrid=hybrid), Job(EF14(TOP), mesh, hybrid=hybrid)
    for both in (job, calm):
        both.step(0)
    kept = [p.detach().clone() for p in job.model.parameters()]
    number = float("nan") if dist.get_rank() == 0 else 1.0
    job.optimizer.zero_grad()
    out = job.model[4]  # type: ignore[index]
    handle = out.register_forward_hook(
        lambda module, args, y: torch.cat([y[:, :1] * number, y[:, 1:]], dim=1)
    )
    loss_of(job.model, dist.get_rank(), 7).backward()
    handle.remove()
    bad = torch.stack([p.grad.to_local().isnan().any() for p in job.model.parameters()])
    anywhere = bad.any().float()
    dist.all_reduce(anywhere)
    job.optimizer.step()  # as one that does not look: what is kept must not have moved
    with torch.no_grad():
        for p, q in zip(job.model.parameters(), kept, strict=True):
            p.copy_(q)
    job.optimizer.zero_grad()
    loss_of(job.model, dist.get_rank(), 8).backward()
    for both in (job, calm):
        both.step(1)
    found["void"] = [job.params(), calm.params(), job.state.dropped, bool(anywhere)]


def accumulated(found: dict[str, Any], mesh: DeviceMesh | None) -> None:
    """Two halves of a batch, and both at once."""
    job, whole = Job(EF14(TOP), mesh), Job(EF14(TOP), mesh)
    for step in range(2):
        for both in (job, whole):
            both.optimizer.zero_grad()
        rank = dist.get_rank()
        for half in range(2):
            job.model.set_requires_gradient_sync(half == 1)  # type: ignore[operator]
            loss_of(job.model, rank, 10 * step + half).backward()
        (
            loss_of(whole.model, rank, 10 * step) + loss_of(whole.model, rank, 10 * step + 1)
        ).backward()
        for both in (job, whole):
            both.optimizer.step()
    found["accumulated"] = [job.params(), whole.params()]


def refused(found: dict[str, Any], mesh: DeviceMesh) -> None:
    """What is told of what cannot be."""

    def told(case: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            found[f"refused: {case}"] = f"{type(error).__name__}: {error}"

    first = dist.get_rank() == 0
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = make_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    whole = mesh._flatten("whole").get_group() if mesh.ndim > 1 else None
    told("plain model", lambda: compress_reduce_scatter(plain, optimizer, DSignSGD()))
    told("joint", lambda: Job(Clip21SGD2M(1.0), None))
    told("two phases", lambda: Job(METHODS["two-way"], None))
    told(
        "float16",
        lambda: Job(DSignSGD(), None, policy=MixedPrecisionPolicy(reduce_dtype=torch.float16)).step(
            0
        ),
    )
    hybrid = make_model()
    fully_shard(hybrid, mesh=mesh)
    other = torch.optim.SGD(hybrid.parameters(), lr=LR)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    told("hybrid", lambda: compress_all_reduce(hybrid, other, DSignSGD(), process_group=alone))
    told("accumulated over replicas", lambda: _over_replicas(mesh))
    job = Job(DSignSGD(), None)
    told(
        "overlap",
        lambda: compress_all_reduce(job.model, job.optimizer, DSignSGD(), process_group=whole),
    )
    told("both", lambda: _both(mesh))
    told("both, the wrong way round", lambda: _both(mesh, scatter_first=False))
    told("unused", lambda: _unused(line))
    told("twice", lambda: _twice(line))
    told("replaced", lambda: _thawed(line))
    told("divided", lambda: _set(lambda m: m.set_gradient_divide_factor(2.0)))
    told("sums", lambda: _set(lambda m: m.set_force_sum_reduction_for_comms(True)))
    told("other ranks", lambda: _other_ranks(mesh, line))
    told("mismatch", lambda: Job(EF14(compressors.TopK(ratio=0.1 if first else 0.2)), None).step(0))


class _Half(nn.Module):
    """Uses one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


class _Halves(nn.Module):
    """Calls a module twice, for another layer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Half()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        self.inner.used, self.inner.unused = self.inner.unused, self.inner.used
        out: Tensor = self.inner(x)
        return out


def _unused(mesh: DeviceMesh) -> None:
    model = _Half()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    compress_reduce_scatter(model, optimizer, DSignSGD())
    model(torch.ones(2, 6)).sum().backward()


def _twice(mesh: DeviceMesh) -> None:
    """Its gradients come in halves, and FSDP2 fills up with zeros."""
    model = _Halves()
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.inner.set_reduce_scatter_unused_params(True)  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    compress_reduce_scatter(model, optimizer, DSignSGD())
    model(torch.ones(2, 6, requires_grad=True)).sum().backward()


def _thawed(mesh: DeviceMesh) -> None:
    """A parameter that begins to train after the hook was made."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0].weight.requires_grad_(False)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    compress_reduce_scatter(model, optimizer, DSignSGD())
    model[0].weight.requires_grad_(True)
    model(torch.ones(2, 6)).sum().backward()


def _set(how: Callable[[Any], None]) -> None:
    job = Job(DSignSGD(), None)
    how(job.model)
    job.step(0)


def _other_ranks(mesh: DeviceMesh, line: DeviceMesh) -> None:
    model = make_model()
    fully_shard(model[3], mesh=mesh["inner"])  # type: ignore[index]
    fully_shard(model, mesh=line)
    compress_reduce_scatter(model, torch.optim.SGD(model.parameters(), lr=LR), DSignSGD())


def _both(mesh: DeviceMesh, *, scatter_first: bool = True) -> None:
    job = Job(DSignSGD(), mesh)  # has an all-reduce
    if scatter_first:
        line = make_model()
        fully_shard(line, mesh=mesh["inner"])
        job.model = line
        job.optimizer = torch.optim.SGD(line.parameters(), lr=LR)
    compress_reduce_scatter(job.model, job.optimizer, DSignSGD())
    outer = mesh.get_group("outer")
    compress_all_reduce(job.model, job.optimizer, DSignSGD(), process_group=outer)


def _over_replicas(mesh: DeviceMesh) -> None:
    job = Job(DSignSGD(), mesh, hybrid="reduce-scatter")
    job.model.set_requires_all_reduce(False)  # type: ignore[operator]
    job.step(0)


def run(rank: int, ranks: int, port: int, folder: str) -> None:
    """One rank: everything, and what it found, into a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=200)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=limit)
    hybrids = {f"hybrid {how}": how for how in ("all-reduce", "reduce-scatter", "both")}
    found: dict[str, Any] = {kind: {} for kind in ("all-reduce", "reduce-scatter", *hybrids)}
    mesh = mesh_of(2)
    try:
        if ranks == 2:
            trained(found["all-reduce"], mesh, UNDER_DDP)
            under_ddp(found["all-reduce"])
            trained(found["reduce-scatter"], None, SCATTERED)
        else:
            trained(found["all-reduce"], mesh, ALL_REDUCED)
            trained(found["reduce-scatter"], None, ["ef14 top-k", "ef21 full"])
            for kind, how in (("all-reduce", mesh), ("reduce-scatter", None)):
                for task in (resumed, void_steps, accumulated):
                    task(found[kind], how)
            moved(found["reduce-scatter"])
            for kind, which in hybrids.items():
                trained(found[kind], mesh, ["ef14 top-k", "ef21 full"], which)
                void_steps(found[kind], mesh, which)
            refused(found, mesh)
    finally:
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    gc.collect()
    dist.barrier()
    os._exit(0)  # threads of gloo do not always outlive the interpreter's end in peace
