"""codec, in eager torch: what leaves the process, of flat float32 tensors.

A message holds a bit per sign (set where x >= 0, the first element in the lowest bit of the first
byte), or numbers of a few bits each, the lowest bit first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Numbers below 2**width as bytes."""
    places = torch.arange(width, device=numbers.device)
    bits = (numbers.reshape(-1, 1) >> places & 1).reshape(-1)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=bits.device)).sum(dim=1).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int, width: int) -> Tensor:
    """The n numbers that `pack_bits` packed, as int64."""
    bits = packed.long().view(-1, 1) >> torch.arange(8, device=packed.device) & 1
    bits = bits.reshape(-1)[: n * width].view(n, width)
    return (bits << torch.arange(width, device=packed.device)).sum(dim=1)


def combine(g: Tensor, e: Tensor | None, a: float, b: float) -> Tensor:
    """What is coded: b * e + a * g, of which b is 1 or -1."""
    return a * g if e is None else b * e + a * g


def signs_of(x: Tensor) -> Tensor:
    """A bit per element: set where x >= 0."""
    return pack_bits((x >= 0).long(), 1)


def subtract_signs(x: Tensor, scale: Tensor) -> None:
    """X -= scale * sign(x), in place."""
    scale = scale.to(x.dtype)
    x.sub_(torch.where(x >= 0, scale, -scale))


def sum_signs(bits: Tensor, scales: Tensor | None, n: int) -> Tensor:
    """The sum over ranks, in their order, of scale * sign; a row of `bits` is a rank's."""
    out = torch.zeros(n, device=bits.device)
    for rank in range(len(bits)):
        sign = unpack_bits(bits[rank], n, 1).to(out.dtype) * 2 - 1
        out += sign if scales is None else sign * scales[rank]
    return out


def top_k(x: Tensor, k: int) -> Tensor:
    """Where the k largest magnitudes are, of equals the first ones, in the tensor's order."""
    order = torch.sort(x.abs().view(torch.int32), descending=True, stable=True).indices
    return torch.sort(order[:k]).values
