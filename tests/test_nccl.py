"""Compressed DDP on GPUs, over NCCL: a rank per GPU, and what the same ranks do on CPUs.

Gradients are data, so that devices agree on them to the bit; what is left is the codec, the
collectives and the optimizer. `make gpu` runs these; the CPU's side of them runs everywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ddp_worker import METHODS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysmooth
from pysmooth.distributed import CompressedState, compressed_hook

SHAPES = ((64, 40), (40,), (30, 8, 5), (1000,), (3,))
STEPS = 4


class Rows(nn.Module):
    """A model whose gradients are what it is given."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.rows = nn.ParameterList(torch.randn(shape, generator=g) for shape in SHAPES)

    def forward(self, data: list[Tensor]) -> Tensor:
        """Their inner product with the parameters."""
        terms = [(p * x).sum() for p, x in zip(self.rows, data, strict=True)]
        return torch.stack(terms).sum()


def train(rank: int, world: int, folder: str, device: str) -> None:
    """Every method for some steps; rank 0 writes down where the parameters end."""
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/{device}", world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    ends = {}
    for name, method in METHODS.items():
        model = Rows().to(device)
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.004)
        optimizer = pysmooth.ClipSGD(model.parameters(), 0.05, momentum=0.9)
        state = CompressedState(ddp, optimizer, method, dense_below=8)
        ddp.register_comm_hook(state, compressed_hook)
        for step in range(STEPS):
            g = torch.Generator().manual_seed(100 * step + rank)
            data = [torch.randn(shape, generator=g).to(device) for shape in SHAPES]
            optimizer.zero_grad()
            ddp(data).backward()
            optimizer.step()
        ends[name] = ([p.detach().cpu() for p in model.rows], state.sent_bytes)
    if rank == 0:
        torch.save(ends, f"{folder}/{device}.pt")
    dist.barrier()
    dist.destroy_process_group()


def ends(folder: Path, world: int, device: str) -> dict[str, tuple[list[Tensor], int]]:
    mp.spawn(train, (world, str(folder), device), nprocs=world)
    found: dict[str, tuple[list[Tensor], int]] = torch.load(folder / f"{device}.pt")
    return found


def test_ranks_on_cpus(tmp_path: Path) -> None:
    """Parameters move, methods differ, and compressed messages are shorter than gradients."""
    found = ends(tmp_path, 2, "cpu")
    start = list(Rows().rows)
    dense = STEPS * 4 * sum(p.numel() for p in start)
    for name, (params, sent) in found.items():
        assert all(not torch.equal(p, q) for p, q in zip(params, start, strict=True)), name
        assert sent < dense or name.startswith("clip21"), name
    assert not torch.equal(found["two-way"][0][0], found["majority"][0][0])


@pytest.mark.gpu
def test_ranks_on_gpus_do_the_same(tmp_path: Path) -> None:
    """The codec's bytes are the CPU's, sums of messages are made in the order of ranks.

    Dense sums are NCCL's: of one rank, or two, they are the CPU's as well.
    """
    world = min(2, torch.cuda.device_count())
    here, there = (ends(tmp_path, world, device) for device in ("cpu", "cuda"))
    for name, (params, sent) in here.items():
        assert there[name][1] == sent, name
        for p, q in zip(params, there[name][0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
