"""codec, in eager torch: what a compressor makes of a flat tensor of float32 or float64."""

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


def qsgd(x: Tensor, levels: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """|x| rounded at random to one of the next two multiples of ||x|| / levels."""
    norm = x.double().square().sum().sqrt().to(x.dtype)
    if float(norm) == 0:
        return torch.zeros_like(x)
    y = x.abs() * levels / norm
    low = y.floor()
    r = random.words(len(x), seed=seed, step=step, tensor_id=tensor_id)
    u = (r >> 8).to(x.dtype) * 2.0**-24
    out = norm * ((low + (u < y - low).to(x.dtype)) / levels)
    return torch.where(x < 0, -out, out)


def natural(x: Tensor, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """|x| rounded at random to one of the next two powers of two. Infinities and NaN stay.

    Below the smallest normal number the two are that number and 0. Where the upper one would
    overflow, the lower one is taken.
    """
    integer, digits = _BITS[x.dtype]
    bits = x.view(integer)
    mantissa = bits & ((1 << digits) - 1)
    lower = bits & ~((1 << digits) - 1)
    r = random.words(len(x), seed=seed, step=step, tensor_id=tensor_id)
    if digits == 23:
        u = r >> 9
    else:
        more = random.words(len(x), seed=seed, step=step, tensor_id=tensor_id | 1 << 31)
        u = r << 20 | more >> 12
    up = (u < mantissa).to(integer) << digits
    rounded = (lower + up).view(x.dtype)
    rounded = torch.where(torch.isinf(rounded), lower.view(x.dtype), rounded)
    return torch.where(torch.isfinite(x), rounded, x)
