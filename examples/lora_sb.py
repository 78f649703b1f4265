"""LoRA-SB against LoRA, LoRA-XS and full fine-tuning: numbers trained, memory, loss.

pip install 'pysmooth[papers,peft]'
python examples/lora_sb.py

A small transformer that reads handwritten digits is fine-tuned on digits that are turned by 90
degrees, with their light inverted. Memory is what training needs beside the weights: gradients and
Adam's states of what is trained.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pysmooth.bench.papers.digits import DigitReader, batches, digits, loss
from torch import nn

import pysmooth
from pysmooth import peft

RANK, BATCH = 8, 64
LAYERS = ["query", "key", "value", "out", "up", "down"]
RATES = {"full": 3e-3, "LoRA": 1e-2, "LoRA-XS": 3e-2, "LoRA-SB": 3e-2}


def pretrained(steps: int) -> DigitReader:
    """Reads digits as they are."""
    torch.manual_seed(0)
    model = DigitReader()
    optimizer = pysmooth.AdamW(model.parameters(), 3e-3, weight_decay=0.0, max_norm=1.0)
    for batch in batches(digits().train, BATCH, steps, torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


def adapt(model: DigitReader, method: str, steps: int) -> nn.Module:
    """The model with what the method trains; the head is trained in all of them."""
    if method == "LoRA":
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=LAYERS, modules_to_save=["head"]
        )
        return get_peft_model(model, config)  # type: ignore[arg-type]
    options: dict[str, Any] = {"rank": RANK, "targets": LAYERS, "train": ["head"]}
    if method == "LoRA-XS":
        return peft.lora_xs(model, **options)
    if method == "LoRA-SB":
        first = list(batches(digits(turned=True).train, 256, 1, torch.Generator().manual_seed(2)))
        # As in the paper: the learning rate over a warm-up of 2 % of the steps.
        step = RATES[method] / max(1.0, 0.02 * steps)
        return peft.lora_sb(model, loss, first, step=step, init_grad="raw", **options)
    return model


def fine_tune(model: nn.Module, rate: float, steps: int) -> dict[str, float]:
    """Trains, and says what it took and gave."""
    data = digits(turned=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = pysmooth.AdamW(trained, rate, weight_decay=0.0, max_norm=1.0)
    for batch in batches(data.train, BATCH, steps, torch.Generator().manual_seed(3)):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    kept = [x for x in states if isinstance(x, torch.Tensor)] + [p.grad for p in trained]
    with torch.no_grad():
        right = (model(data.test[0]).argmax(1) == data.test[1]).float().mean()
        return {
            "trained": sum(p.numel() for p in trained),
            "bytes": sum(x.numel() * x.itemsize for x in kept if x is not None),
            "loss": float(loss(model, data.test)),
            "accuracy": float(right),
        }


def compare(steps: int = 200, before: int = 300) -> dict[str, dict[str, float]]:
    """Every method, from the same model."""
    start = pretrained(before)
    out = {}
    for method, rate in RATES.items():
        torch.manual_seed(4)
        out[method] = fine_tune(adapt(copy.deepcopy(start), method, steps), rate, steps)
    return out


if __name__ == "__main__":
    print(f"{'':10}{'trained':>10}{'KB':>10}{'loss':>10}{'accuracy':>10}")
    for name, row in compare().items():
        print(
            f"{name:10}{row['trained']:10.0f}{row['bytes'] / 1e3:10.0f}"
            f"{row['loss']:10.3f}{row['accuracy']:10.3f}"
        )
