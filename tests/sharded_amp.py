"""GradScaler over shards: cases for two processes, and for 2 x 2 with tensor parallelism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sharded_tp
import torch
import torch.distributed as dist
from ddp_worker import TOP, loss_of
from fsdp_worker import Job, mesh_of
from simulated_workers import same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import pysmooth
from pysmooth.compressors import ScaledSign
from pysmooth.distributed import EF14, EF21, GradScaler
from pysmooth.optim._base import FusedOptimizer

SCALERS: dict[str, Any] = {
    "torch": torch.amp.GradScaler,
    "FSDP1's": ShardedGradScaler,
    "ours": GradScaler,
}
MAKES: dict[str, Any] = {
    "adamw": lambda p: pysmooth.AdamW(p, 0.01, max_norm=0.1),
    "external": lambda p: pysmooth.ClipSGD(p, 0.1, momentum=0.9, max_norm=0.1, amp="external"),
    "ef": lambda p: pysmooth.EFSGD(p, 0.1, ScaledSign()),
    "torch": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
}
SCALE = 256.0  # powers of two: so to the bit


class _Model(nn.Module):
    """Two layers, one of which has fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class _Training:
    """A sharded model with an optimizer and, perhaps, a scaler."""

    def __init__(self, make: Any, scaler: Any, *, unscale: bool) -> None:
        self.model = _Model()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(self.model.first, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = make(self.model.parameters())
        self.scaler = None if scaler is None else scaler("cpu", init_scale=SCALE)
        self.unscale = unscale

    def step(self, number: int, overflow: int | None = None) -> None:
        """One step; `overflow`: the rank whose shards get an infinity."""
        x = torch.randn(
            4, 5, generator=torch.Generator().manual_seed(10 * number + dist.get_rank())
        )
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if overflow == dist.get_rank():
            grad = self.model.first.weight.grad
            assert grad is not None
            grad.to_local()[0, 0] = math.inf
        if self.unscale:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            pysmooth.clip_grad_norm_(self.model.parameters(), 0.05)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def kept(self) -> list[Tensor]:
        """This rank's parameters and states."""
        tensors: list[Tensor] = []
        for p in self.model.parameters():
            states = self.optimizer.state.get(p, {}).values()
            tensors += [t.detach().clone() for t in (p, *states) if isinstance(t, Tensor)]
        return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def overflows() -> None:
    """An overflow on one rank's shard: no rank steps, scales agree, and on as if nothing was."""
    for scaler in SCALERS.values():
        for name, make in MAKES.items():
            for unscale in (False, True):
                what = (scaler, name, unscale)
                job, calm = (_Training(make, s, unscale=unscale) for s in (scaler, None))
                for step in range(2):
                    job.step(step)
                    calm.step(step)
                before = job.kept()
                job.step(7, overflow=1)
                assert same(before, job.kept()), what
                assert job.scaler.get_scale() == SCALE / 2, what
                job.step(2)
                calm.step(2)
                assert same(job.kept(), calm.kept()), what


def _compressed(hybrid: str, method: Any, scaler: Any, make: Any, **kwargs: Any) -> Job:
    mesh = None if hybrid == "scatter" else mesh_of(dist.get_world_size())
    return Job(method, mesh, make=make, scaler=scaler, **kwargs)


def _reduce(job: Job, number: int, scaler: Any, *, overflow: bool = False) -> None:
    """A step of a compressed job; `overflow`: rank 1's gradients are not finite."""
    job.optimizer.zero_grad()
    factor = math.inf if overflow and dist.get_rank() == 1 else 1.0
    last: Any = job.model[4]  # type: ignore[index]
    handle = last.register_forward_hook(
        lambda module, args, y: torch.cat([y[:, :1] * factor, y[:, 1:]], dim=1)
    )
    loss = loss_of(job.model, dist.get_rank(), number)
    handle.remove()
    if scaler is None:
        loss.backward()
        job.optimizer.step()
        return
    scaler.scale(loss).backward()
    if number % 2:
        scaler.unscale_(job.optimizer)
        pysmooth.clip_grad_norm_(job.model.parameters(), 1e6)
    scaler.step(job.optimizer)
    scaler.update()


def compressed_overflows() -> None:
    """Compressed reductions under a scaler: what one rank overflows changes no residual."""

    def fused(params: Any, lr: float) -> FusedOptimizer:
        return pysmooth.ClipSGD(params, lr)

    for kind in ("scatter", "replicas"):
        for make in (torch.optim.SGD, fused):
            for method in (EF14(TOP), EF21(TOP, eta=0.4)):
                what = (kind, make, method)
                scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
                job = _compressed(kind, method, scaler, make)
                calm = _compressed(kind, method, None, make)
                for step in range(3):
                    if step == 1:
                        before = job.state.state_dict()["states"], job.params()
                        for number in (7, 8):  # with `unscale_`, and without
                            _reduce(job, number, scaler, overflow=True)
                            _unchanged(before, job, what)
                        assert scaler.get_scale() == SCALE / 4, what
                    _reduce(job, step, scaler)
                    _reduce(calm, step, None)
                assert same(job.params(), calm.params()), what
                assert job.state.steps == calm.state.steps == 3


def _unchanged(before: Any, job: Job, what: Any) -> None:
    states, params = before
    after = job.state.state_dict()["states"]
    assert same(params, job.params()), what
    for name, kept in states.items():
        for key, value in kept.items():
            equal = torch.equal(value, after[name][key]) if key != "steps" else True
            assert equal, (what, name, key)


def overflows_elsewhere() -> None:
    """A parameter that no reduction sees overflows on one rank: its step is nobody's."""

    scaler = GradScaler("cpu", init_scale=SCALE)
    _beside(scaler, "propagate", math.inf if dist.get_rank() == 1 else 0.0)
    assert scaler.get_scale() == SCALE / 2
    _beside(None, "skip", math.inf)  # nobody agrees about it: on all ranks


def _beside(scaler: Any, nonfinite: str, gradient: float) -> None:
    extra = torch.ones(3, requires_grad=True)

    def make(params: Any, lr: float) -> FusedOptimizer:
        return pysmooth.ClipSGD([*params, extra], lr, nonfinite=nonfinite)

    job = _compressed("scatter", EF14(TOP), scaler, make)
    _reduce(job, 0, scaler)
    before = job.state.state_dict()["states"], job.params()
    extra.register_hook(lambda g: g + gradient)
    job.model.register_forward_hook(lambda module, args, y: y + 0.0 * extra.sum())
    _reduce(job, 2, scaler)
    assert torch.equal(extra, torch.ones(3))
    _unchanged(before, job, nonfinite)
    assert job.state.steps == 1
    assert job.state.dropped == 1


def tensor_parallel() -> None:
    """An overflow in one process of 2 x 2: torch's scaler is told on, ours agrees."""
    mesh = sharded_tp.square()
    for name in ("adamw", "torch"):
        net, alone = sharded_tp.sharded(mesh), sharded_tp.make_model()
        # The first parameter lies on "dp" alone.
        optimizer, reference = MAKES[name](net.parameters()), MAKES[name](alone.parameters())
        scaler = GradScaler("cpu", init_scale=SCALE)
        for step in range(3):
            optimizer.zero_grad()
            loss = sharded_tp.loss_of(net, sharded_tp.mine(mesh, sharded_tp.batch(step)))
            scaler.scale(loss).backward()
            if step == 1:
                _poison(net)
            scaler.step(optimizer)
            scaler.update()
            if step != 1:
                reference.zero_grad()
                sharded_tp.loss_of(alone, sharded_tp.batch(step)).backward()
                reference.step()
        assert scaler.get_scale() == SCALE / 2
        sharded_tp.as_alone(net, alone, name)
    net = sharded_tp.sharded(mesh)
    optimizer = MAKES["adamw"](net.parameters())
    theirs = torch.amp.GradScaler("cpu", init_scale=SCALE)
    theirs.scale(sharded_tp.loss_of(net, sharded_tp.batch(0)[:4])).backward()
    _poison(net)
    before = [p.to_local().clone() for p in net.parameters()]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"pysmooth\.distributed\.GradScaler"):
        theirs.step(optimizer)
    after = [p.to_local() for p in net.parameters()]  # type: ignore[attr-defined]
    assert same(before, after)


def _poison(net: nn.Module) -> None:
    if dist.get_rank() == 3:
        grad: Any = net[0].up.weight.grad  # type: ignore[index]
        grad.to_local()[0, 0] = math.inf
