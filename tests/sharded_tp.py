"""FSDP2 over modules that are tensor-parallel already: cases for four processes, 2 x 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import BACKEND, agreed, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pysmooth
from pysmooth.compressors import ScaledSign
from pysmooth.optim._base import FusedOptimizer

Make = Callable[[Any], FusedOptimizer]

STEPS, BATCH = 3, 8
MAKES: dict[str, Make] = {
    "adamw": lambda p: pysmooth.AdamW(p, 0.02, max_norm=0.1),
    "clip_tensor": lambda p: pysmooth.ClipSGD(p, 0.1, momentum=0.9, max_norm=0.05, scope="tensor"),
    "clip_inf": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.01, norm_type=math.inf),
    "norm": lambda p: pysmooth.MAdagradNorm(p, 0.5, b_init=0.1),
    "normalized": lambda p: pysmooth.NormalizedSGD(p, 0.1),
    "ef_sign": lambda p: pysmooth.EFSGD(p, 0.1, ScaledSign(), max_norm=1.0),
    "clip21": lambda p: pysmooth.Clip21SGD2M(p, 0.1, tau=0.05),
}


class Block(nn.Module):
    """A norm that is not parallel, and two layers that are; cut unevenly in both dimensions."""

    def __init__(self, begin: int, width: int, end: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(begin)
        self.up, self.down = nn.Linear(begin, width), nn.Linear(width, end)

    def forward(self, x: Tensor) -> Tensor:
        """Residuals left out: widths differ."""
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return out


def make_model(width: int = 10) -> nn.Sequential:
    """The same numbers in every process."""
    torch.manual_seed(0)
    return nn.Sequential(Block(6, width, 7), Block(7, width, 3))


def square() -> DeviceMesh:
    """Data times tensor parallelism."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def parallel(tp: DeviceMesh, width: int = 10) -> nn.Sequential:
    """The model, its layers split over a mesh."""
    net = make_model(width)
    plan = {}
    for i in range(len(net)):
        plan |= {f"{i}.up": ColwiseParallel(), f"{i}.down": RowwiseParallel()}
    parallelize_module(net, tp, plan)
    return net


def sharded(mesh: DeviceMesh, width: int = 10) -> nn.Sequential:
    """The model, split over "tp" and then sharded over "dp"."""
    net = parallel(mesh["tp"], width)
    for block in net:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(net, mesh=mesh["dp"])
    return net


def batch(step: int) -> Tensor:
    """Of all data-parallel ranks."""
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))


def mine(mesh: DeviceMesh | None, x: Tensor) -> Tensor:
    """What this rank trains on; the same on all ranks of "tp"."""
    if mesh is None:
        return x
    each = BATCH // mesh["dp"].size()
    return x[mesh.get_local_rank("dp") * each :][:each]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """Something to make smaller."""
    out: Tensor = (net(x) - x[:, :3]).square().mean()
    return out


def train(net: nn.Module, optimizer: Any, mesh: DeviceMesh | None, first: int = 0) -> None:
    """Some steps."""
    for step in range(first, first + STEPS):
        optimizer.zero_grad()
        loss_of(net, mine(mesh, batch(step))).backward()
        optimizer.step()


def as_alone(net: nn.Module, alone: nn.Module, what: str) -> None:
    """Same parameters, but for rounding."""
    for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
        error = float((whole(p.detach()) - q.detach()).abs().max())
        assert error <= 2e-5, (what, name, error)


def optimizers() -> None:
    """Steps, norms and states are those of the whole model."""
    mesh = square()
    for name, make in MAKES.items():
        net, alone = sharded(mesh), make_model()
        optimizer, reference = make(net.parameters()), make(alone.parameters())
        train(net, optimizer, mesh)
        train(alone, reference, None)
        as_alone(net, alone, name)
        assert optimizer.resolved_backend == BACKEND
        norm, expected = optimizer.last_norm(), reference.last_norm()
        assert (norm is None) == (expected is None)
        if norm is not None and expected is not None:
            torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-7, msg=name)
            assert agreed(norm), name
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            kept, other = optimizer.state.get(p, {}), reference.state.get(q, {})
            assert kept.keys() == other.keys()
            for key, value in kept.items():
                if isinstance(value, DTensor):
                    assert value.placements == p.placements  # type: ignore[attr-defined]
                near = 1e-3 * float(other[key].abs().max()) + 1e-7
                assert float((whole(value) - other[key]).abs().max()) <= near, (name, key)


def rows() -> None:
    """AGC, of matrices whose rows are cut by both dimensions of the mesh."""
    mesh = square()
    net, alone = sharded(mesh), make_model()
    for model, where in ((net, mesh), (alone, None)):
        params = [p for name, p in model.named_parameters() if name.endswith("up.weight")]
        train(model, pysmooth.ClipSGD(params, 0.1, clip="agc", agc_factor=0.01), where)
    as_alone(net, alone, "agc")
    across = [p for name, p in net.named_parameters() if name.endswith("down.weight")]
    loss_of(net, mine(mesh, batch(0))).backward()
    with pytest.raises(ValueError, match="sharded within them"):
        pysmooth.ClipSGD(across, 0.1, clip="agc", agc_factor=0.01).step()


def clips() -> None:
    """`clip_grad_norm_` counts each element once, whatever mesh its tensor lies on."""
    mesh = square()
    for norm_type in (2.0, 1.0, math.inf, 3.0):
        net, alone = sharded(mesh), make_model()
        loss_of(net, mine(mesh, batch(0))).backward()
        loss_of(alone, batch(0)).backward()
        norm = pysmooth.clip_grad_norm_(net.parameters(), 0.05, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05, norm_type)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        assert agreed(norm)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-4, atol=1e-7)


def saved(folder: str) -> None:
    """Trains, and saves with torch.distributed.checkpoint."""
    mesh = square()
    for name in ("adamw", "norm"):
        net = sharded(mesh)
        optimizer = MAKES[name](net.parameters())
        train(net, optimizer, mesh)
        state = {
            "model": get_model_state_dict(net),
            "optim": get_optimizer_state_dict(net, optimizer),
        }
        dcp.save(state, checkpoint_id=f"{folder}/{name}")


def whole_states() -> None:
    """States as whole tensors: torch's, where it can cut them (evenly), and `load_state_dict`."""
    mesh, full = square(), StateDictOptions(full_state_dict=True)
    for name in ("adamw", "norm"):
        net = sharded(mesh, 12)
        optimizer = MAKES[name](net.parameters())
        train(net, optimizer, mesh)
        model = get_model_state_dict(net, options=full)
        states = get_optimizer_state_dict(net, optimizer, options=full)
        other, third = sharded(mesh, 12), sharded(mesh, 12)
        for it in (other, third):
            set_model_state_dict(it, model, options=full)
        again, plain = MAKES[name](other.parameters()), MAKES[name](third.parameters())
        set_optimizer_state_dict(other, again, states, options=full)
        held = optimizer.state_dict()
        held["state"] = {
            i: {key: whole(value) for key, value in kept.items()}
            for i, kept in held["state"].items()
        }
        plain.load_state_dict(held)
        for it, steps in ((net, optimizer), (other, again), (third, plain)):
            train(it, steps, mesh, STEPS)
        for p, *copies in zip(*(m.parameters() for m in (net, other, third)), strict=True):
            for q in copies:
                assert torch.equal(p.to_local(), q.to_local()), name


def loaded(folder: str, *, tensor_parallel: bool) -> None:
    """Goes on with what `saved` wrote, on the same mesh or sharded over two processes alone."""
    mesh = square() if tensor_parallel else None
    line = None if tensor_parallel else init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for name in ("adamw", "norm"):
        net = sharded(mesh) if mesh is not None else make_model()
        if line is not None:
            fully_shard(net, mesh=line)
        optimizer = MAKES[name](net.parameters())
        state = {
            "model": get_model_state_dict(net),
            "optim": get_optimizer_state_dict(net, optimizer),
        }
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(net, state["model"])
        set_optimizer_state_dict(net, optimizer, state["optim"])
        alone = make_model()
        reference = MAKES[name](alone.parameters())
        train(alone, reference, None)
        train(alone, reference, None, STEPS)
        train(net, optimizer, mesh if mesh is not None else line, STEPS)
        as_alone(net, alone, name)


def here(folder: str) -> None:
    """`loaded` on the mesh that saved."""
    loaded(folder, tensor_parallel=True)
    dist.barrier()


def elsewhere(folder: str) -> None:
    """`loaded` on two processes without tensor parallelism."""
    loaded(folder, tensor_parallel=False)
