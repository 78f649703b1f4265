"""What an update rule is made of, on this backend. Twin of csrc/core/rule.h.

A rule is a pair of small @triton.jit functions in triton_kernels/math:

    prepare(h, x)       the constants of a tensor's update, in float64, from the hyper-parameters
                        `h` (in the published order) and what is known of it, `x[FIRST]` ...
    update(p, g, s, h)  one block of elements in registers: parameter, gradient, states,
                        constants; returns the new parameter and the tuple of new states

The drivers own loading and storing, dtypes, tails and layouts, and what becomes of the gradient
before a rule sees it; a rule never sees a pointer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton.language as tl

# Places in what prepare() is told of a tensor.
FIRST = tl.constexpr(0)  # not 0: this is its first step, the states hold nothing yet
STEP = tl.constexpr(1)  # how many steps it has seen, this one included; 0 where nobody counts
COEF = tl.constexpr(2)  # what its gradient is multiplied by
NORM_BEFORE = tl.constexpr(3)  # accumulated squared norm, without and with this step's
NORM_AFTER = tl.constexpr(4)

Function = Any  # of triton.jit: a compiled one, or the interpreter's


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: the same in every backend.
        hyper: names of its hyper-parameters, in the order they are passed.
        states: number of state tensors.
        prepare, update: see above.
        constants: how many numbers prepare() returns.
        reads_grad: false if it rewrites a single stream in place.
        counts_steps: whether it depends on how many steps a tensor has seen.
        accumulate: for rules that accumulate the squared norm of a scope unit's clipped gradients:
            accumulate(h, norm_sq, sum_squares).
        low_states: states, as bits, that may be kept in bfloat16.
    """

    name: str
    hyper: tuple[str, ...]
    states: int
    prepare: Function
    update: Function
    constants: int
    reads_grad: bool = True
    counts_steps: bool = False
    accumulate: Function = None
    low_states: int = 0
