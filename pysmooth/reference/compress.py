"""compress, in eager torch: what a compressor makes of a flat tensor of float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from . import random

_BITS = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}


def top_k(x: Tensor, k: int) -> Tensor:
    """Keeps the k largest magnitudes, of equals the first ones. NaN is larger than infinity."""
    integer, _ = _BITS[x.dtype]
    order = x.abs().view(integer)
    chosen = torch.sort(order, descending=True, stable=True).indices[:k]
    out = torch.zeros_like(x)
    out[chosen] = x[chosen]
    return out


def rand_k(x: Tensor, k: int, *, scaled: bool, seed: int, step: int, tensor_id: int) -> Tensor:
    """Keeps k coordinates drawn without replacement; `scaled`: times d / k."""
    chosen = random.permutation(k, len(x), seed=seed, step=step, tensor_id=tensor_id)
    out = torch.zeros_like(x)
    out[chosen] = x[chosen] * (len(x) / k) if scaled else x[chosen]
    return out


def scaled_sign(x: Tensor, scale: Tensor) -> Tensor:
    """+scale where x >= 0, else -scale."""
    scale = scale.to(x.dtype)
    return torch.where(x >= 0, scale, -scale)


def qsgd(x: Tensor, levels: int, block: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """|x| rounded at random to one of the next two multiples of ||x|| / levels, block by block.

    Where that is too small for a normal number nothing is left; it is never infinite.
    """
    info = torch.finfo(x.dtype)
    block = min(block, len(x))
    unit = qsgd_units(x, levels, block).repeat_interleave(block)[: len(x)]
    small = unit < info.tiny
    unit = unit.clamp(max=info.max)
    inverse = torch.where(small, 0.0, 1.0 / unit).to(x.dtype)
    unit = torch.where(small, 0.0, unit).to(x.dtype)
    y = x.abs() * inverse
    y = torch.where(y > levels, levels, y)
    low = y.floor()
    drawn = random.bits(len(x), x.dtype, seed=seed, step=step, tensor_id=tensor_id).to(x.device)
    out = torch.where(random.uniform(drawn) < y - low, low + 1, low) * unit
    return torch.where(x < 0, -out, out)


def qsgd_units(x: Tensor, levels: int, block: int) -> Tensor:
    """||x|| / levels of each block, in double."""
    squares = torch.nn.functional.pad(x.double().square(), (0, -len(x) % block))
    return squares.view(-1, block).sum(dim=1).sqrt() / levels


def natural(x: Tensor, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """|x| rounded at random to one of the next two powers of two. Infinities and NaN stay.

    Below the smallest normal number the two are that number and 0. Where the upper one would
    overflow, the lower one is taken.
    """
    integer, digits = _BITS[x.dtype]
    bits = x.view(integer)
    cut = bits & ((1 << digits) - 1)
    lower = bits - cut
    drawn = random.bits(len(x), x.dtype, seed=seed, step=step, tensor_id=tensor_id).to(x.device)
    kept = x.element_size() * 8 - digits  # as an integer without sign: shift, and mask
    up = (drawn >> kept & ((1 << digits) - 1)) < cut
    rounded = (lower + (up.to(integer) << digits)).view(x.dtype)
    rounded = torch.where(torch.isinf(rounded), lower.view(x.dtype), rounded)
    return torch.where(torch.isfinite(x), rounded, x)
