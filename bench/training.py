"""Two small real trainings on data that every machine has."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Training:
    """A model, its data in order, and the optimizer settings that both sides share."""

    name: str
    description: str
    make_model: Callable[[], nn.Module]
    loss: Loss
    batch: Callable[[int], tuple[Tensor, Tensor]]  # the batch of step i, always the same
    lr: float
    momentum: float
    max_norm: float


def gpt() -> Training:
    """A byte-level GPT on the source code of Python's standard library."""
    from transformers import GPT2Config, GPT2LMHeadModel

    context, size = 64, 8
    text = _standard_library(2_000_000)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=256,
            n_positions=context,
            n_embd=192,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: nn.Module = GPT2LMHeadModel(config)
        return model

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        at = torch.randint(len(data) - context - 1, (size,), generator=generator)
        rows = torch.stack([data[i : i + context + 1] for i in at.tolist()]).long()
        return rows[:, :-1], rows[:, 1:]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    text_from = f"{len(text) / 1e6:.1f} MB of the standard library's source"
    return Training(
        "GPT, 4 layers of 192", text_from, make_model, loss, batch, 0.05, 0.9, max_norm=1.0
    )


def convnet() -> Training:
    """A small residual-free conv net on scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        width = 1
        for out in (16, 16, 32, 32):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
        )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(step))
        return x[at], y[at]

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    return Training(
        "conv net, 4 layers", "scikit-learn digits", make_model, loss, batch, 0.02, 0.9, 1.0
    )


def _standard_library(limit: int) -> bytes:
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return bytes(text[:limit])
