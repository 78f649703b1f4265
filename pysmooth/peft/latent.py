"""Adapters whose only trained part is a small square matrix between two frozen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Latent(nn.Module):
    """x -> B R x, with B frozen and R trained: what stands in for LoRA's B.

    Args:
        b: (m, r).
        r: (r, r).

    `weight` is their product, which is what PEFT asks an adapter for when it merges it.
    """

    B: Tensor

    def __init__(self, b: Tensor, r: Tensor) -> None:
        super().__init__()
        self.register_buffer("B", b)
        self.R = nn.Parameter(r)
        self._projections: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """B R."""
        return self.B @ self.R

    def forward(self, x: Tensor) -> Tensor:
        """B R x."""
        return x @ self.R.T @ self.B.T

    @torch.no_grad()
    def project(self, a: Tensor, scale: float) -> None:
        """From now on R's gradients are those of the optimal projection: see `optimal_projection`.

        The two r x r factors are made once; backward multiplies R's gradient by them while it is in
        cache, and the optimizer's pass over all R takes it as it is.
        """
        wide = self.B.double(), a.double()
        left = torch.linalg.inv(wide[0].T @ wide[0]) / scale**2
        right = torch.linalg.inv(wide[1] @ wide[1].T)
        first = self._projections is None
        self._projections = left.to(self.R.dtype), right.to(self.R.dtype)
        if first:
            self.R.register_hook(self._projected)  # type: ignore[no-untyped-call]

    def _projected(self, grad: Tensor) -> Tensor:
        assert self._projections is not None
        left, right = self._projections
        return left.to(grad) @ grad @ right.to(grad)


class LatentLinear(nn.Module):
    """W x + bias + scale * B R A x: a linear layer with an adapter.

    Args:
        base: the layer; it is kept, and frozen.
        a: (r, n).
        b: (m, r).
        r: (r, r).
        scale: s.
    """

    A: Tensor

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, r: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("A", a)
        self.latent = Latent(b, r)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        out: Tensor = self.base(x) + self.latent(x @ self.A.T) * self.scale
        return out


class Adapted:
    """One adapted layer, ours or PEFT's, seen alike.

    Args:
        name: of the module.
        module: a `LatentLinear`, or a LoRA layer of PEFT.
        adapter: the name that PEFT has for the adapter.
    """

    def __init__(self, name: str, module: nn.Module, adapter: str = "default") -> None:
        self.name, self.module, self.adapter = name, module, adapter

    @property
    def latent(self) -> Latent:
        """B and R."""
        if isinstance(self.module, LatentLinear):
            return self.module.latent
        found: Any = self.module.lora_B
        latent: Latent = found[self.adapter]
        return latent

    @property
    def a(self) -> Tensor:
        """A."""
        if isinstance(self.module, LatentLinear):
            return self.module.A
        found: Any = self.module.lora_A
        weight: Tensor = found[self.adapter].weight
        return weight

    @property
    def scale(self) -> float:
        """What B R A is multiplied by."""
        if isinstance(self.module, LatentLinear):
            return self.module.scale
        found: Any = self.module.scaling
        return float(found[self.adapter])

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Scale * B R A, as it is added to a weight (m, n); in float64."""
        latent = self.latent
        return latent.B.double() @ latent.R.double() @ self.a.double() * self.scale
