"""Random numbers that depend on nothing but where they are used. Twin of csrc/core/random.h.

Philox4x32-10 (Salmon et al., SC 2011) and permutations keyed by it. 32-bit words live in int64.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def bits(count: int, dtype: torch.dtype, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """Random bits of integers as wide as `dtype`: a word each, or two, the second drawn apart."""
    upper = words(count, seed=seed, step=step, tensor_id=tensor_id)
    if dtype != torch.float64:
        return torch.where(upper > _WORD >> 1, upper - (_WORD + 1), upper).to(torch.int32)
    return upper << 32 | words(count, seed=seed, step=step, tensor_id=tensor_id | 1 << 31)


def uniform(drawn: Tensor) -> Tensor:
    """Random bits as numbers in [0, 1): as many digits as fit beside the exponent of 1."""
    if drawn.dtype == torch.int32:
        return (drawn >> 9 & 0x7FFFFF | 0x3F800000).view(torch.float32) - 1
    return (drawn >> 12 & (1 << 52) - 1 | 0x3FF << 52).view(torch.float64) - 1


# -2 ln(1 + f) = f^2 - 2 f + f^3 (...), sin(y) = y + y^3 (...), cos(y) = 1 - y^2 / 2 + y^4 (...)
_LOG = (
    *(-0.6666663, 0.5000162, -0.40004572, 0.33249104),
    *(-0.28362402, 0.2625757, -0.25763178, 0.15718919),
)
_SIN = (-0.16666655, 0.008332178, -0.00019517296)
_COS = (0.041666646, -0.0013887368, 2.4438448e-05)


def normal(count: int, *, seed: int, step: int, tensor_id: int) -> Tensor:
    """Standard normal numbers in float32, none larger than 6.7, from a word each."""
    drawn = words(count + count % 2, seed=seed, step=step, tensor_id=tensor_id)
    return box_muller(drawn.view(-1, 2)).reshape(-1)[:count]


def box_muller(pairs: Tensor) -> Tensor:
    """Pairs of normal numbers from pairs of words.

    Twin of csrc/core/math/normal.h to the bit: nothing but sums, products and square roots.
    """
    first, second = pairs[:, 0], pairs[:, 1]
    # u = 2^e * (1 + f), in (0, 1]
    u = ((first >> 1).float() + 0.5) * 2.0**-31
    whole = u.view(torch.int32)
    e = whole - 0x3F3504F3 >> 23
    f = (whole - (e << 23)).view(torch.float32) - 1
    square = f * f
    log = square * (f * _polynomial(_LOG, f)) + square - f * 2 - e.float() * 1.3862944
    radius = log.double().sqrt().float()  # torch's own, in float32, is not always rounded right
    # The angle's quarter turns, and what is left of it, in [-pi / 4, pi / 4].
    turns = second + (1 << 29) >> 30
    y = (second - (turns << 30)).float() * 1.4629181e-09
    z = y * y
    sin = y * z * _polynomial(_SIN, z) + y
    cos = z * z * _polynomial(_COS, z) - z * 0.5 + 1
    odd = turns & 1 == 1
    left, up = (turns + 1) & 2 != 0, turns & 2 != 0
    across, along = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    across = torch.where(left, -across, across) * radius
    along = torch.where(up, -along, along) * radius
    return torch.stack([across, along], dim=1)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The polynomial, by Horner's rule."""
    out = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        out = out * x + c
    return out


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

    Args:
        x: a dense tensor; its elements are numbered in memory order.
        step: the optimizer's steps before this one.
        tensor_id: the parameter's place among all of the optimizer.
        turn: the number of the state, of those that are rounded so.
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
