"""Lightning: mixed precision and a clip, in the step or by Lightning.

    pip install pysmooth pytorch-lightning
    python examples/lightning_module.py

Lightning refuses to clip (`gradient_clip_val`) the gradients of an optimizer that unscales for
itself, as torch's fused ones and pysmooth's do. Two ways out: `max_norm=...` in the optimizer, the
faster one; or `amp="external"`, with which pysmooth leaves the unscaling to GradScaler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

import pysmooth

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Regression(pl.LightningModule):
    """A small network, with whatever optimizer is asked for."""

    def __init__(self, make: MakeOptimizer) -> None:
        super().__init__()
        self.make = make
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of one batch."""
        return (self.net(batch[0]).float() - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> dict[str, Any]:
        """An optimizer and its schedule."""
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(make: MakeOptimizer, **kwargs: Any) -> Regression:
    """Trains for some steps; `kwargs` are the Trainer's."""
    torch.manual_seed(0)
    module = Regression(make)
    data = torch.utils.data.TensorDataset(torch.randn(40, 8))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return module


if __name__ == "__main__":
    train(lambda p: pysmooth.AdamW(p, 0.01, max_norm=0.1), precision="bf16-mixed")
    train(
        lambda p: pysmooth.AdamW(p, 0.01, amp="external"),
        precision="bf16-mixed",
        gradient_clip_val=0.1,
    )
