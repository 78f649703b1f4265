"""FSDP2 on 2 x 2 processes: shards within a node, signs with error feedback between the nodes.

torchrun --nproc-per-node 4 examples/fsdp2_compressed.py
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from pysmooth.distributed import TwoWaySign, compress_all_reduce


def train(x: torch.Tensor, y: torch.Tensor, mesh: DeviceMesh, *, compress: bool) -> float:
    """The loss on all digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    # Uncompressed, FSDP2 averages over both dimensions itself.
    fully_shard(model, mesh=mesh["inner"] if compress else mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    if compress:
        state = compress_all_reduce(
            model, optimizer, TwoWaySign(), process_group=mesh.get_group("outer")
        )
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(100):
        generator = torch.Generator().manual_seed(step * ranks + rank)
        at = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
    if compress and rank == 0:
        shard = 4 * sum(p.to_local().numel() for p in model.parameters())
        print(f"{state.sent_bytes} bytes a step between nodes, for {shard} bytes of gradients")
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y).item()


def main() -> None:
    """Trains dense, then compressed."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    for compress in (False, True):
        loss = train(x, y, mesh, compress=compress)
        if dist.get_rank() == 0:
            print(f"{'signs' if compress else 'dense'}: loss {loss:.3f}")
    del mesh
    gc.collect()  # shards, before their process group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
