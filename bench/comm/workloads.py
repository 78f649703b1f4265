"""What is trained: models whose gradients take longer to send than to compute, on real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..training import Training, gpt


def wide() -> Training:
    """A wide perceptron on scikit-learn's digits: 8.5 M parameters that compute little."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    width = 2048

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
        )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(x), (16,), generator=torch.Generator().manual_seed(step))
        return x[at], y[at]

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    name = "perceptron, 3 layers of 2048"
    return Training(name, "scikit-learn digits", make_model, loss, batch, 0.05, 0.9, 1.0)


@dataclass(frozen=True)
class Workload:
    """A training, and the steps after which its loss is compared."""

    make: Callable[[], Training]
    steps: int


WORKLOADS = {"wide": Workload(wide, 300), "gpt": Workload(gpt, 300)}
