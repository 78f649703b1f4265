"""Random numbers that depend on nothing but where they are used. Twin of csrc/core/random.h.

Philox4x32-10 (Salmon et al., SC 2011) and permutations keyed by it. 32-bit words live in int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_PERMUTE = 0x9E3779B9


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four random words for every counter: four int64 tensors of words, of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _wide_product(c0, 0xD2511F53)
        high1, low1 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Upper and lower word of a * b, where the product would not fit into int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def words(count: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """Word i of a tensor of `count` elements: word i mod 4 of block i div 4."""
    blocks = torch.arange((count + 3) // 4)
    same = torch.zeros_like(blocks)
    key = (seed & _WORD, seed >> 32 & _WORD)
    drawn = philox([blocks & _WORD, blocks >> 32, same + step, same + tensor_id], key)
    return torch.stack(drawn, dim=1).reshape(-1)[:count]


def normal(count: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """Standard normal numbers in float64: Box-Muller on the words of two elements each."""
    pairs = words(4 * ((count + 1) // 2), seed=seed, step=step, tensor_id=tensor_id).view(-1, 4)
    u = ((pairs[:, 0] << 20 | pairs[:, 1] >> 12) + 1).double() * 2.0**-52  # in (0, 1]
    angle = (pairs[:, 2] << 20 | pairs[:, 3] >> 12).double() * (2.0**-52 * 2 * math.pi)
    radius = (-2 * u.log()).sqrt()
    drawn = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return drawn.reshape(-1)[:count]


def permutation(count: int, size: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """The first `count` elements of a permutation of range(size).

    A Feistel network of six rounds over the next power of four, walked until it is back inside.
    """
    half = (max(1, (size - 1).bit_length()) + 1) // 2
    mask = (1 << half) - 1
    counter = torch.arange(2)
    same = torch.zeros_like(counter)
    key = ((seed & _WORD) ^ _PERMUTE, seed >> 32 & _WORD)
    drawn = philox([counter, same, same + step, same + tensor_id], key)
    keys = torch.stack(drawn, dim=1).reshape(-1)[:6].tolist()
    out = torch.arange(count)
    outside = torch.ones(count, dtype=torch.bool)
    while bool(outside.any()):
        left, right = out[outside] >> half, out[outside] & mask
        for k in keys:
            left, right = right, left ^ (_mix32(right ^ k) & mask)
        out[outside] = left << half | right
        outside = out >= size
    return out


def round_stochastically(x: Tensor, *, step: int, tensor_id: int, turn: int) -> Tensor:
    """float32 numbers as bfloat16: rounded up with the probability of what is cut off.

    Elements are numbered in memory order. `turn`: the number of the state, of those that are
    rounded so.
    """
    flat = _memory_order(x).contiguous()
    key = philox([torch.tensor(n) for n in (0, 0, step, tensor_id)], (0x6A09E667, 0xBB67AE85))
    first, second = (int(key[0]) + 0x9E3779B9 * (turn // 2)) & _WORD, int(key[1])
    index = torch.arange(flat.numel()) & _WORD
    n = _wide_product(index, 0x9E3779B9)[1] ^ first
    n = (_wide_product(n ^ n >> 16, 0x7FEB352D)[1] + second) & _WORD
    n = _wide_product(n ^ n >> 15, 0x846CA68B)[1]
    n = (n ^ n >> 16) >> 16 * (turn % 2) & 0xFFFF
    bits = flat.view(torch.int32).to(torch.int64).cpu() & _WORD
    up = (bits + n) & 0xFFFF0000
    up = torch.where(up >= 1 << 31, up - (1 << 32), up).to(torch.int32)
    rounded = up.view(torch.float32).to(x.device)
    out = torch.where(flat.isfinite(), rounded, flat).to(torch.bfloat16)
    result = torch.empty_like(x, dtype=torch.bfloat16)
    _memory_order(result).copy_(out.view(_memory_order(result).shape))
    return result


def _memory_order(x: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _mix32(x: Tensor) -> Tensor:
    x = x ^ x >> 16
    x = _wide_product(x, 0x7FEB352D)[1]
    x = x ^ x >> 15
    x = _wide_product(x, 0x846CA68B)[1]
    return x ^ x >> 16
