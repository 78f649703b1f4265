"""`pysmooth.swap`: the optimizer of a training that is under way gets its fused twin, and back.

python examples/swap.py
"""

from __future__ import annotations

import torch

import pysmooth


def main() -> list[float]:
    """Trains with torch, pysmooth and torch again, under one schedule."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    losses = []
    for step in range(30):
        if step == 10:
            optimizer = pysmooth.swap(optimizer, max_norm=1.0)  # the schedule follows
        elif step == 20:
            optimizer = pysmooth.unswap(optimizer, drop=["clip"])
        optimizer.zero_grad()
        loss = (model(x := torch.randn(16, 8)) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        if not isinstance(optimizer, pysmooth.AdamW):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print(main())
