"""Draws the picture of distributed.md: `python docs/methods/plots_distributed.py`.

Four processes train a logistic regression with DistributedDataParallel, each on rows of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from plots import draw
from torch import multiprocessing, nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

from pysmooth import QSGD, ScaledSign, TopK
from pysmooth.distributed import (
    DCSGD,
    EF14,
    EF21,
    CompressedState,
    DSignSGD,
    Method,
    compressed_hook,
)

RANKS, DIM, ROWS, STEPS = 4, 2000, 1000, 300
# The method, and its learning rate: a step along signs is of another length.
METHODS: dict[str, tuple[Callable[[], Method] | None, float]] = {
    "dense": (None, 0.3),
    "EF14, TopK 1 %": (lambda: EF14(TopK(ratio=0.01)), 0.3),
    "EF14, ScaledSign": (lambda: EF14(ScaledSign()), 0.3),
    "EF21, TopK 1 %": (lambda: EF21(TopK(ratio=0.01)), 0.3),
    "DCSGD, QSGD 64": (lambda: DCSGD(QSGD(64)), 0.3),
    "DSignSGD": (DSignSGD, 0.003),
}


def train(rank: int, make: Callable[[], Method] | None, lr: float) -> tuple[list[float], float]:
    """This rank's losses, step by step, and the bits of its message."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, DIM)
    x = torch.randn(RANKS * ROWS, DIM, generator=generator) * scales
    y = torch.sign(x @ torch.randn(DIM, generator=generator))
    order = x[:, 0].argsort()[rank * ROWS : (rank + 1) * ROWS]  # ranks differ
    x, y = x[order], y[order]
    model = nn.Linear(DIM, 1, bias=False)
    nn.init.zeros_(model.weight)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    state = None
    if make is not None:
        state = CompressedState(ddp, optimizer, make())
        ddp.register_comm_hook(state, compressed_hook)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = softplus(-y * ddp(x).squeeze(1)).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, 8.0 * state.sent_bytes if state is not None else 32.0 * DIM


def work(rank: int, store: str, folder: Path) -> None:
    """One process; the first draws."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    curves = {}
    for label, (make, lr) in METHODS.items():
        losses, bits = train(rank, make, lr)
        mean = torch.tensor(losses) / RANKS
        dist.all_reduce(mean)
        curves[label] = ([bits * step for step in range(1, STEPS + 1)], mean)
    if rank == 0:
        path = folder / "distributed.png"
        draw(path, curves, "bits that a rank sends", "loss over all data", xlog=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (f"{scratch}/store", Path(__file__).parent)
        multiprocessing.spawn(work, arguments, nprocs=RANKS)
