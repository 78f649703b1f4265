"""apply: one pass over parameters, gradients and states with a rule's update."""

from __future__ import annotations

import triton
import triton.language as tl

from .draw import drawn
from .how import How  # noqa: F401 - what HOW is
from .operands import CONSTANTS, OWN, constants_at, sweep, take, tensor_of, write


@triton.jit
def change(tensor, more, first, o, limit, sums, count, HOW: tl.constexpr):
    """Elements `o`, as far as they are below `limit`."""
    mask = o < limit
    where, p, g, s = take(tensor, o, mask, HOW)
    h = constants_at(tensor, o, mask, HOW)
    if HOW.draws:
        p, s = HOW.rule(p, g, s, h, drawn(first, tensor[3], o.shape[0], HOW))
    else:
        p, s = HOW.rule(p, g, s, h)
    write(tensor[0], where, mask, (p, g) + s, o, tensor[3], HOW.writes, HOW)
    return sums, count


@triton.jit
def apply(
    tensors,
    gradients,
    layouts,
    chunk_tensor,
    chunk_index,
    numbers,
    keys,
    go,
    HOW: tl.constexpr,
):
    """Updates one chunk."""
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c)
    wanted = (tl.load(gradients + t) != 0) & (tl.load(go) != 0)
    if HOW.alone:  # a factor of 1 changes nothing
        wanted = wanted & (tl.load(numbers + t * CONSTANTS + OWN) != 1.0)
    if wanted:
        tensor, numel = tensor_of(tensors, gradients, layouts, numbers, keys, t, HOW)
        sweep(change, tensor, (), tl.load(chunk_index + c), numel, HOW)
