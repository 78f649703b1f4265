"""Accelerate: gradient accumulation, a schedule, and a checkpoint of everything.

pip install pysmooth accelerate
python examples/accelerate_loop.py
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator

import pysmooth


def train(kind: str = "fused", batches: int = 12) -> list[torch.Tensor]:
    """Steps on every second of so many batches, with pysmooth ("fused") or with torch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if kind == "fused":
        optimizer: torch.optim.Optimizer = pysmooth.AdamW(model.parameters(), 0.01, max_norm=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = torch.utils.data.TensorDataset(torch.randn(4 * batches, 8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            if kind != "fused" and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # parameters as safetensors, the optimizer by torch.save
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        accelerator.load_state(folder)
    after = [p.detach() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return after


if __name__ == "__main__":
    train()
