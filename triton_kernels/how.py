"""What a pass over the operands of tensors is compiled for: one constant of a kernel."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import triton.language as tl

from .table import CHUNK

STORED = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16,  # as bits, see ops.py
    torch.uint8: tl.uint8,  # marks
}
# How a 16-bit parameter is kept. Values as in csrc/core/param_storage.h.
PLAIN, MASTER, KAHAN, STOCHASTIC = (tl.constexpr(n) for n in range(4))


@dataclass(frozen=True)
class How:
    """Operands are numbered: parameter, gradient, states, what goes with the parameter.

    Attributes:
        types: what each operand is stored as.
        rule: the function of the rule that the pass evaluates.
        numbers: how many constants it takes.
        reads, writes: operands, as bits; what goes with the parameter comes with it.
        dims: of the layout; 0: all operands are dense, and walked in step.
        aligned: each is one dense block at a 16-byte boundary.
        block: elements that a program takes at a time.
        zero: gradients that are not finite count as 0.
        kept: how the parameter is kept, PLAIN to STOCHASTIC.
        noisy: operands, as bits, that are rounded at random.
        turn: number of the first of them: passes of one step have noise of their own.
        draws: what is drawn for each element: NOTHING, BITS or NORMAL (draw.py); or MARKS.
        alone: the gradient is all there is, and is what the rule changes.
        sum: what the values of a pass are summed up as.
        starts: states, as bits, that are the gradient in a tensor's first step.
        keeps: the value of a pass is its state 0, as that is stored.
        collects: values that reach a filter are kept in lists (select.py).
        wide: magnitudes are compared as float64.
        again: gives the value of a pass once more, after it.
        span: elements that share a compressor's scale; 0: all of a unit.
        per_block: constants, as bits, that are the block's own.
        rows: the gradient has a coefficient per row, beside the tensor's.
        absorbed: the states have taken the gradient in: a value is what again() gives.
    """

    types: tuple[Any, ...]
    rule: Any
    numbers: int
    reads: int
    writes: int
    dims: int = 0
    aligned: bool = False
    block: int = 1024
    zero: bool = False
    kept: int = 0
    noisy: int = 0
    turn: int = 0
    draws: int = 0
    alone: bool = False
    sum: int = 0
    starts: int = 0
    keeps: bool = False
    collects: bool = False
    wide: bool = False
    again: Any = None
    span: int = 0
    per_block: int = 0
    rows: bool = False
    absorbed: bool = False

    @property
    def count(self) -> int:
        """Operands."""
        return len(self.types)

    @property
    def states(self) -> int:
        """States of the rule."""
        return self.count - 2 - self.paired

    @property
    def held(self) -> int:
        """What goes with the parameter: its number."""
        return self.count - 1

    @property
    def paired(self) -> bool:
        """Whether something goes with the parameter: the last operand."""
        return self.kept in (MASTER.value, KAHAN.value)

    @property
    def chunk(self) -> int:
        """Elements of a chunk."""
        return CHUNK

    @property
    def compute(self) -> Any:
        """What is computed in."""
        return tl.float64 if self.types[0] == tl.float64 else tl.float32

    @property
    def widest(self) -> int:
        """Bytes of an element of the widest operand."""
        return max(int(t.primitive_bitwidth) for t in self.types) // 8

    @property
    def vector(self) -> int:
        """Elements that a thread takes at a time: 16 bytes of the widest operand.

        With more, narrow operands would have another arrangement of elements over threads than wide
        ones, and go through shared memory.
        """
        return 16 // self.widest

    @cached_property
    def cache_key(self) -> str:
        """What it depends on, the code of functions included: Triton looks for this name."""
        parts = (getattr(self, f.name) for f in fields(self))
        return "/".join(str(getattr(part, "cache_key", part)) for part in parts)

    def __repr__(self) -> str:
        """A name that may become part of a kernel's."""
        return "how" + hashlib.sha256(self.cache_key.encode()).hexdigest()[:16]
