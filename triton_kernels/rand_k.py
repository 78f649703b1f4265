"""select: the first k of a random permutation. Twin of csrc/core/random.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .how import How  # noqa: F401 - what HOW is
from .operands import tensor_of
from .ops import mix32, philox, word
from .sample import chosen_of, selecting
from .select import accept
from .table import KEY_STEP, ROW_CHUNKS, ROW_WORDS


@triton.jit
def mixed(index, half, low, keys):
    """Six rounds of a Feistel network."""
    left = word(index >> half.to(tl.uint64)) & low
    right = word(index) & low
    for i in tl.static_range(6):
        after = left ^ (mix32(right ^ keys[i]) & low)
        left = right
        right = after
    return (left.to(tl.uint64) << half.to(tl.uint64)) | right.to(tl.uint64)


@triton.jit
def permuted(j, size, seed_low, seed_high, step, t):
    """A permutation of [0, size), drawn by seed, step and tensor. Twin of csrc/core/random.h."""
    b = tl.arange(0, 64).to(tl.int64)
    smaller = (b < 62) & ((tl.full([64], 1, tl.int64) << tl.minimum(b, 62)) < size)
    half = (tl.maximum(tl.sum(smaller.to(tl.int32), axis=0), 1) + 1) // 2
    low = word((tl.full((), 1, tl.int64) << half.to(tl.int64)) - 1)
    zero = step * 0
    a = philox(zero, zero, step, word(t), seed_low ^ 0x9E3779B9, seed_high)
    b = philox(zero + 1, zero, step, word(t), seed_low ^ 0x9E3779B9, seed_high)
    index = mixed(j.to(tl.uint64), half, low, a + b)
    outside = index.to(tl.int64) >= size
    while tl.max(outside.to(tl.int32), axis=0) != 0:
        index = tl.where(outside, mixed(index, half, low, a + b), index)
        outside = index.to(tl.int64) >= size
    return index.to(tl.int64)


@triton.jit
def rand_k(
    tensors,
    gradients,
    layouts,
    hypers,
    chunk_tensor,
    chunk_index,
    numbers,
    keys,
    go,
    spec,
    seeds,
    HOW: tl.constexpr,
    FREEZES: tl.constexpr,
):
    """A share of the first k of a permutation of a tensor's elements is taken in."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    if selecting(tensors, gradients, hypers, go, t, FREEZES):
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        k = chosen_of(numel, spec)
        shares = tl.load(tensors + t.to(tl.int64) * ROW_WORDS + ROW_CHUNKS)
        share = tl.load(chunk_index + c).to(tl.int64)
        end = k * (share + 1) // shares
        scale = tl.full((), 1.0, tl.float64)
        if tl.load(spec + 2) != 0:
            scale = numel.to(tl.float64) / k.to(tl.float64)
        step = tensor[3][KEY_STEP]
        for first in range(k * share // shares, end, HOW.block):
            j = first + tl.arange(0, HOW.block)
            mask = j < end
            # Those past the end might be walked for ever.
            j = tl.where(mask, j, 0)
            o = permuted(j, numel, tl.load(seeds), tl.load(seeds + 1), step, t)
            accept(tensor, o, mask, scale.to(HOW.compute), HOW)
