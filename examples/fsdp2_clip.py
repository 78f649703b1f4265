"""FSDP2: clipping by the norm of the whole model, inside the step, on sharded parameters.

torchrun --nproc-per-node 2 examples/fsdp2_clip.py
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pysmooth


def model() -> nn.Sequential:
    """The same numbers in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 33), nn.Tanh(), nn.Linear(33, 3))


def train(net: nn.Module, batches: torch.Tensor, steps: int = 20) -> tuple[float, float]:
    """The last loss and the last norm."""
    optimizer = pysmooth.AdamW(net.parameters(), 0.01, max_norm=0.5)
    for step in range(steps):
        x = batches[step]
        loss = (net(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    norm = optimizer.last_norm()
    assert norm is not None
    return float(loss.detach()), float(norm)


def main() -> None:
    """Trains sharded, then the same model whole, and compares."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    every = torch.randn(20, 8 * dist.get_world_size(), 10)  # of all processes
    mine = every[:, 8 * dist.get_rank() :][:, :8]

    net = model()
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    _, norm = train(net, mine)
    whole = model()
    _, expected = train(whole, every)
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-5)
    if dist.get_rank() == 0:
        print(f"norm of the last gradient: sharded {norm:.6f}, whole {expected:.6f}")
    del net, whole, mesh, p, q  # before their process group
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
