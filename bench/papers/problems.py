"""Problems that several experiments share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .registry import need
from .runs import F64

LIBSVM = ("a9a", "mushrooms", "phishing")


@dataclass(frozen=True)
class Logistic:
    """Workers with m samples each: mean log(1 + exp(-b a'x)) + lam sum x_j^2 / (1 + x_j^2).

    Args:
        samples: (n, m, d), rows times labels.
        lam: of the regulariser, which is not convex.
    """

    samples: Tensor
    lam: float = 0.1

    def gradients(self, x: Tensor) -> Tensor:
        """(n, S, d) at points (S, d)."""
        margins = self.samples @ x.T
        weights = -torch.sigmoid(-margins) / self.samples.shape[1]
        return weights.transpose(1, 2) @ self.samples + 2 * self.lam * x / (1 + x * x) ** 2

    def smoothness(self) -> tuple[float, float]:
        """(L, Ltilde) of the mean, and the root mean square of the workers' own."""
        n, m, d = self.samples.shape
        whole = float(torch.linalg.matrix_norm(self.samples.reshape(n * m, d), 2)) ** 2
        own = torch.linalg.matrix_norm(self.samples, 2) ** 2 / (4 * m) + 2 * self.lam
        return whole / (4 * n * m) + 2 * self.lam, float(own.square().mean().sqrt())

    def ef21_step(self, k: int) -> float:
        """The largest step size of EF21's theory, for Top-k."""
        alpha = k / self.samples.shape[2]
        root = math.sqrt(1 - alpha)
        smooth, tilde = self.smoothness()
        return 1 / (smooth + tilde * root / (1 - root))


def shards(points: Tensor, labels: Tensor, workers: int) -> Tensor:
    """(n, m, d): equal parts, in order; what is left over is dropped."""
    rows = points * labels.unsqueeze(1)
    m = len(rows) // workers
    return rows[: workers * m].reshape(workers, m, -1)


def breast_cancer() -> tuple[Tensor, Tensor]:
    """scikit-learn's (569 x 30), each feature scaled to [-1, 1]; labels -1 and 1."""
    raw: Any = need("sklearn.datasets").load_breast_cancer()
    x = torch.tensor(raw.data, dtype=F64)
    low, high = x.min(0).values, x.max(0).values
    return 2 * (x - low) / (high - low) - 1, torch.tensor(raw.target, dtype=F64) * 2 - 1


def libsvm(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """A file of libsvm's format; labels -1 and 1.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it does not have two labels.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"--data has no file {name}")
    x, y = need("sklearn.datasets").load_svmlight_file(str(path))
    labels = torch.tensor(y, dtype=F64)
    kinds = torch.tensor(sorted(set(labels.tolist())))
    if len(kinds) != 2:
        raise ValueError(f"{name} has {len(kinds)} labels, not two")
    return torch.tensor(x.toarray(), dtype=F64), torch.where(labels == kinds[1], 1.0, -1.0).to(F64)
