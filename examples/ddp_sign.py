"""DDP that sends signs, both ways, with error feedback: 1 bit per parameter and way.

torchrun --nproc-per-node 2 examples/ddp_sign.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pysmooth.distributed import CompressedState, TwoWaySign, compressed_hook


def train(x: torch.Tensor, y: torch.Tensor, *, compress: bool) -> tuple[float, int]:
    """The loss on all digits, and the bytes of a step's messages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sent = 4 * sum(p.numel() for p in model.parameters())
    if compress:
        state = CompressedState(ddp, optimizer, TwoWaySign())
        ddp.register_comm_hook(state, compressed_hook)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(150):
        generator = torch.Generator().manual_seed(step * ranks + rank)
        at = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x[at]), y[at]).backward()
        optimizer.step()
    if compress:
        sent = state.sent_bytes
    return nn.functional.cross_entropy(model(x), y).item(), sent


def main() -> None:
    """Trains dense, then compressed."""
    dist.init_process_group("gloo")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    for compress in (False, True):
        loss, sent = train(x, y, compress=compress)
        if dist.get_rank() == 0:
            print(f"{'signs' if compress else 'dense'}: loss {loss:.3f}, {sent} bytes a step")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
