"""FSDP2 trains, and its checkpoints move from 4 processes to 2; FSDP1 and ZeRO are refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import pysmooth
from pysmooth.optim._base import FusedOptimizer

STEPS, BATCH = 3, 8


def _make(which: str) -> tuple[nn.Module, FusedOptimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
    if which == "adamw":
        return net, pysmooth.AdamW(net.parameters(), 0.05, max_norm=0.1)
    return net, pysmooth.MAdagradNorm(net.parameters(), 0.5, b_init=0.1)


def _train(net: nn.Module, optimizer: FusedOptimizer, first: int) -> None:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for step in range(first, first + STEPS):
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
        mine = x[rank * BATCH // world : (rank + 1) * BATCH // world]
        net(mine).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _compare(net: nn.Module, which: str, steps: int) -> None:
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    make = {
        "adamw": lambda: pysmooth.AdamW(alone.parameters(), 0.05, max_norm=0.1),
        "norm": lambda: pysmooth.MAdagradNorm(alone.parameters(), 0.5, b_init=0.1),
    }[which]
    optimizer = make()
    for step in range(steps):
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
        alone(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-4, atol=2e-5)


def _save(folder: str) -> None:
    for which in ("adamw", "norm"):
        net, optimizer = _make(which)
        _train(net, optimizer, 0)
        _compare(net, which, STEPS)
        state = {
            "model": get_model_state_dict(net),
            "optim": get_optimizer_state_dict(net, optimizer),
        }
        dcp.save(state, checkpoint_id=f"{folder}/{which}")


def _load(folder: str) -> None:
    for which in ("adamw", "norm"):
        net, optimizer = _make(which)
        state = {
            "model": get_model_state_dict(net),
            "optim": get_optimizer_state_dict(net, optimizer),
        }
        dcp.load(state, checkpoint_id=f"{folder}/{which}")
        set_model_state_dict(net, state["model"])
        set_optimizer_state_dict(net, optimizer, state["optim"])
        _train(net, optimizer, STEPS)
        _compare(net, which, 2 * STEPS)


def _refusals(folder: str) -> None:
    torch.manual_seed(0)
    for keeps in (True, False):
        net = FullyShardedDataParallel(
            nn.Linear(6, 4), use_orig_params=keeps, device_id=torch.device("cpu")
        )
        optimizer = pysmooth.ClipSGD(net.parameters(), 0.1, max_norm=1.0)
        net(torch.ones(2, 6)).sum().backward()
        with pytest.raises(ValueError, match="FSDP1"):
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at import
        from torch.distributed.optim import ZeroRedundancyOptimizer
    plain = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer"):
        ZeroRedundancyOptimizer(
            plain.parameters(), optimizer_class=pysmooth.ClipSGD, lr=0.1, max_norm=1.0
        )
    pysmooth.ClipSGD(plain.parameters(), lr=0.1, max_norm=1.0)  # beside it: nothing wrong


@pytest.mark.interpreted
@pytest.mark.emulated
def test_checkpoints_move_from_four_processes_to_two(tmp_path: Path) -> None:
    run(4, str(tmp_path / "four"), _save, args=(str(tmp_path),))
    run(2, str(tmp_path / "two"), _load, _refusals, args=(str(tmp_path),))


@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("fsdp2_clip.py", 2, "norm of the last gradient: sharded"),
        ("fsdp2_compressed.py", 4, "signs: loss"),
        ("titan_loop.py", 2, "sharded as whole, resumed to the bit"),
    ],
)
def test_the_examples_run(name: str, ranks: int, says: str) -> None:
    path = Path(__file__).parent.parent / "examples" / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(ranks), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
