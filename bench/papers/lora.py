"""LoRA, the rival of what `pysmooth.peft` puts on a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """W x + bias + B A x, with A drawn and B = 0; the layer itself is frozen."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        a = torch.empty(rank, n).uniform_(-1, 1, generator=generator) * (3 / n) ** 0.5
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(m, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        out: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return out


def lora(
    model: nn.Module,
    rank: int,
    generator: torch.Generator,
    *,
    targets: Sequence[str] | None = None,
    train: Sequence[str] = (),
) -> nn.Module:
    """Puts LoRA (scale 1) on the linear layers whose names end so; the rest is frozen but `train`.

    The uniform start of A is that of arXiv:2106.09685's code.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        home, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and (targets is None or last in targets):
            setattr(model.get_submodule(home), last, LoraLinear(module, rank, generator))
    for name, p in model.named_parameters():
        if name.startswith(tuple(train)) and train:
            p.requires_grad_(True)
    return model
