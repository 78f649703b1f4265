"""One plain torch loop with everything: compile, activation checkpointing, accumulation, EMA, amp.

    python examples/torch_loop.py

The step is no part of what is compiled; its kernels are, ahead of time. A `torch.compile` around
the whole training step breaks the graph there, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import pysmooth


class Net(nn.Module):
    """Two blocks, whose activations are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the input's columns, as the net knows it."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def train(
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    compiler: str | None = None,
    dtype: torch.dtype | None = None,
    max_norm: float | None = None,
    steps: int = 6,
) -> tuple[nn.Module, nn.Module]:
    """Trains, and returns the model and its average. `max_norm`: of a clip outside of the step."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return (model(x).float() - x.sum(1, keepdim=True)).square().mean()

    forward = loss_of if compiler is None else torch.compile(loss_of, backend=compiler)
    for _ in range(steps):
        optimizer.zero_grad()
        for x in torch.randn(2, 16, 8):  # gradients of two small batches add up
            scaler.scale(forward(x) / 2).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
    return model, average.module


if __name__ == "__main__":
    train(lambda p: pysmooth.AdamW(p, 0.01, max_norm=0.1), compiler="inductor")
    train(lambda p: pysmooth.AdamW(p, 0.01, max_norm=0.1), dtype=torch.float16)
