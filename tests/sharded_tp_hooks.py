"""Compressed reductions of FSDP2 over tensor-parallel modules: cases for 2 x 2 processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_worker import TOP
from sharded import whole
from sharded_tp import loss_of, make_model, parallel, sharded, square
from simulated_workers import Workers, close, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pysmooth.distributed import EF14, EF21, Method, compress_all_reduce, compress_reduce_scatter

STEPS, LR = 4, 0.2
METHODS: tuple[Method, ...] = (EF14(TOP), EF21(TOP, eta=0.4, init="full"))


class Job:
    """A model on its way; `kind`: which reduction is compressed, and on which mesh."""

    def __init__(self, kind: str, method: Method) -> None:
        if kind == "scatter":
            mesh = square()
            self.worker = mesh.get_local_rank("dp")
            self.model = sharded(mesh)
        else:
            names = ("outer", "inner", "tp")
            mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)
            self.worker = mesh.get_local_rank("outer")
            self.model = parallel(mesh["tp"])
            over = mesh["inner"] if kind == "replicas" else mesh["outer", "inner"]
            for block in self.model:
                fully_shard(block, mesh=over)
            fully_shard(self.model, mesh=over)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        if kind == "scatter":
            self.state: Any = compress_reduce_scatter(
                self.model, self.optimizer, method, dense_below=8
            )
        else:
            self.state = compress_all_reduce(
                self.model,
                self.optimizer,
                method,
                process_group=mesh.get_group("outer"),
                dense_below=8,
            )

    def backward(self, step: int) -> None:
        """Gradients of this worker's batch."""
        self.optimizer.zero_grad()
        loss_of(self.model, batch(self.worker, step)).backward()

    def step(self, step: int) -> None:
        """One step."""
        self.backward(step)
        self.optimizer.step()

    def params(self) -> list[Tensor]:
        """Whole parameters as they are."""
        return [whole(p.detach()).clone() for p in self.model.parameters()]


def batch(worker: int, step: int) -> Tensor:
    """A worker's data."""
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(10 * step + worker))


def _split(name: str, x: Tensor) -> list[Tensor]:
    """What the two tensor-parallel ranks have of it."""
    if ".up." in name:
        return list(x.chunk(2))
    return list(x.chunk(2, dim=1)) if name.endswith("down.weight") else [x, x]


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if ".up." in name:
        return torch.cat(parts)
    return torch.cat(parts, dim=1) if name.endswith("down.weight") else parts[0]


def simulated(method: Method, shards: int) -> list[Tensor]:
    """Two workers of each tensor-parallel rank; messages are about that rank's part of a tensor."""

    def cut(x: Tensor) -> list[Tensor]:
        each = -(-len(x) // shards)
        return [x[i * each : (i + 1) * each].flatten() for i in range(shards)]

    model = make_model()
    named = list(model.named_parameters())
    halves = [_split(name, p.detach()) for name, p in named]
    everybody = [Workers(method, 2, [s for h in halves for s in cut(h[t])]) for t in range(2)]
    for step in range(STEPS):
        grads = []
        for worker in range(2):
            model.zero_grad()
            loss_of(model, batch(worker, step)).backward()
            grads.append([_split(name, p.grad) for name, p in named if p.grad is not None])
        means = [
            workers.average([[s for h in own for s in cut(h[t])] for own in grads], LR)
            for t, workers in enumerate(everybody)
        ]
        with torch.no_grad():
            for i, (name, p) in enumerate(named):
                parts = []
                for t in range(2):
                    flat = torch.cat(means[t][i * shards : (i + 1) * shards])
                    parts.append(flat.view_as(halves[i][t]))
                p -= LR * _join(name, parts)
    return [p.detach() for _, p in named]


def reductions() -> None:
    """As simulated workers, one set for each tensor-parallel rank."""
    for kind, shards in (("scatter", 2), ("replicas", 1), ("hybrid", 1)):
        for method in METHODS:
            job = Job(kind, method)
            for step in range(STEPS):
                job.step(step)
            close(job.params(), simulated(method, shards), 1e-5)
            assert job.state.steps == STEPS


def resumed() -> None:
    """With the same bits; another tensor-parallel rank's states are refused."""
    for kind in ("scatter", "replicas"):
        job = Job(kind, METHODS[1])
        for step in range(2):
            job.step(step)
        saved = job.state.state_dict()
        other = Job(kind, METHODS[1])
        for p, q in zip(other.model.parameters(), job.model.parameters(), strict=True):
            p.detach().to_local().copy_(q.detach().to_local())  # type: ignore[attr-defined]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, saved)
        neighbour = every[dist.get_rank() ^ 1]
        with pytest.raises(ValueError, match="state_dict is of part"):
            other.state.load_state_dict(neighbour)
        other.state.load_state_dict(saved)
        for both in (job, other):
            both.step(2)
        assert same(job.params(), other.params()), kind


def void_steps() -> None:
    """A NaN in one process's part of a gradient: its neighbours in "tp" keep nothing, either."""

    handles: list[Any] = []

    def spoil(module: nn.Module, args: Any) -> None:
        weight: Any = module.weight
        if dist.get_rank() == 0:
            handles.append(weight.register_hook(lambda g: g * float("nan")))

    for kind in ("scatter", "replicas"):
        job, calm = Job(kind, METHODS[0]), Job(kind, METHODS[0])
        for both in (job, calm):
            both.step(0)
        kept = [p.detach().clone() for p in job.model.parameters()]
        first: Any = job.model[0]
        handles.append(first.up.register_forward_pre_hook(spoil))
        job.step(7)
        for handle in handles:
            handle.remove()
        grad: Any = next(p.grad for name, p in job.model.named_parameters() if "0.up.w" in name)
        assert bool(grad.to_local().isnan().any()) == (dist.get_rank() % 2 == 0)
        assert job.state.dropped == 1
        with torch.no_grad():
            for p, q in zip(job.model.parameters(), kept, strict=True):
                p.copy_(q)
        for step in range(1, 3):
            for both in (job, calm):
                both.step(step)
        assert same(job.params(), calm.params()), kind
