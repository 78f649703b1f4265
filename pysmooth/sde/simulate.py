"""Euler-Maruyama, all paths at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .models import SDE


@torch.no_grad()
def euler_maruyama(
    sde: SDE, start: Tensor, time: float, steps: int, *, seed: int = 0, keep: bool = False
) -> Tensor:
    """Simulates X up to `time`.

    Equivalent to::

        for _ in range(steps):
            x = x + drift(x) * dt + diffusion(x) * sqrt(dt) * randn

    Args:
        sde: drift and diffusion.
        start: (paths, d), floating point.
        time: greater than 0; one step of a method is a time of `lr`.
        steps: how many, at least 1.
        seed: of the noise.
        keep: return all points, (steps + 1, paths, d), instead of the last ones.

    Raises:
        ValueError: an argument is out of range.
    """
    if not time > 0:
        raise ValueError(f"time must be greater than 0; got {time}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if start.dim() != 2 or not start.is_floating_point():
        raise ValueError("start must be a floating point tensor of shape (paths, d)")
    generator = torch.Generator(device=start.device).manual_seed(seed)
    dt = time / steps
    x, kept = start.clone(), [start.clone()]
    for _ in range(steps):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = x + sde.drift(x) * dt + sde.diffusion(x) * (math.sqrt(dt) * noise)
        if keep:
            kept.append(x)
    return torch.stack(kept) if keep else x
