"""codec, in eager torch: what leaves the process, of flat float32 tensors.

A message holds a bit per sign (set where x >= 0, the first element in the lowest bit of the first
byte), or numbers of a few bits each, the lowest bit first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compress


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


def sum_top_k(messages: Tensor, n: int, k: int) -> Tensor:
    """The sum over ranks of messages about k of n numbers: their places, then they."""
    width = (n - 1).bit_length()
    size = -(-min(k * width, n) // 8)
    out = torch.zeros(n, device=messages.device)
    for message in messages:
        if n < k * width:
            index = unpack_bits(message[:size], n, 1).nonzero().reshape(-1)
        else:
            index = unpack_bits(message[:size], k, width)
        out[index] += floats(message[size:])
    return out


def code_natural(x: Tensor, seed: int, step: int, tensor_id: int) -> tuple[Tensor, Tensor]:
    """C(x) of natural compression, and its message: exponents, then signs."""
    sent = compress.natural(x, seed=seed, step=step, tensor_id=tensor_id)
    bits = sent.view(torch.int32)
    signs = pack_bits((bits < 0).long(), 1)
    return sent, torch.cat([(bits >> 23 & 0xFF).to(torch.uint8), signs])


def sum_natural(messages: Tensor, n: int) -> Tensor:
    """The sum over ranks of such messages."""
    out = torch.zeros(n, device=messages.device)
    for message in messages:
        size = (message[:n].to(torch.int32) << 23).view(torch.float32)
        negative = unpack_bits(message[n:], n, 1) != 0
        out += torch.where(negative, -size, size)
    return out


def code_levels(
    x: Tensor, levels: int, block: int, seed: int, step: int, tensor_id: int
) -> tuple[Tensor, Tensor]:
    """C(x) of QSGD, and its message: units of blocks, then levels with a sign each."""
    sent = compress.qsgd(x, levels, block, seed=seed, step=step, tensor_id=tensor_id)
    info = torch.finfo(torch.float32)
    unit = compress.qsgd_units(x, levels, block)
    unit = torch.where(unit < info.tiny, 0.0, unit.clamp(max=info.max)).float()
    each = unit.repeat_interleave(block)[: len(x)]
    level = torch.where(each > 0, sent.abs() / each, 0.0).round().long()
    packed = pack_bits(level << 1 | (sent < 0), 1 + levels.bit_length())
    return sent, torch.cat([unit.view(torch.uint8), packed])


def sum_levels(messages: Tensor, n: int, levels: int, block: int) -> Tensor:
    """The sum over ranks of such messages."""
    units = 4 * -(-n // block)
    out = torch.zeros(n, device=messages.device)
    for message in messages:
        each = floats(message[:units]).repeat_interleave(block)[:n]
        coded = unpack_bits(message[units:], n, 1 + levels.bit_length())
        size = (coded >> 1).float() * each
        out += torch.where((coded & 1) != 0, -size, size)
    return out


def floats(message: Tensor) -> Tensor:
    """Bytes as float32."""
    return message.clone(memory_format=torch.contiguous_format).view(torch.float32)
