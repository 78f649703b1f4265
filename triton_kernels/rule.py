"""What an update rule is made of, on this backend. Twin of csrc/core/rule.h.

A rule is a pair of small @triton.jit functions in triton_kernels/math:

    prepare(h, x)       the constants of a tensor's update, in float64, from the hyper-parameters
                        `h` (in the published order) and what is known of it, `x[FIRST]` ...
    update(p, g, s, h)  one block of elements in registers: parameter, gradient, states,
                        constants; returns the new parameter and the tuple of new states

and, for a method whose scale or clip depends on more than the gradient, a source per pass:

    source(p, g, s, h)  the same for a pass before apply: returns a value, which is summed up over
                        the scope of the pass, then the new parameter and states. prepare() is
                        called again with every sum

A rule that draws random numbers is handed them as a fifth argument where its streams say so. For
passes whose values are selected from, or scaled by blocks, it has

    again(g, s)         the value once more, after the pass
    taken(p, s, c, h)   what becomes of a chosen coordinate of value c

and no update where nothing is left to do.

The drivers own loading and storing, dtypes, tails and layouts, and what becomes of the gradient
before a rule sees it; a rule never sees a pointer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton.language as tl

# Places in what prepare() is told of a tensor.
FIRST = tl.constexpr(0)  # not 0: this is its first step, the states hold nothing yet
STEP = tl.constexpr(1)  # how many steps it has seen, this one included; 0 where nobody counts
COEF = tl.constexpr(2)  # what its gradient is multiplied by
NORM_BEFORE = tl.constexpr(3)  # accumulated squared norm, without and with this step's
NORM_AFTER = tl.constexpr(4)
LAST_SCALE = tl.constexpr(5)  # STAGE of the step before, for rules that keep it
PICKED = tl.constexpr(6)  # what chosen coordinates are multiplied by: unbiased rand-k
STAGE = tl.constexpr(7)  # of each pass: the mean magnitude, or the norm, of its values; 0 before
KNOWN = tl.constexpr(12)
WIDE = tl.constexpr(12)  # not 0: float64 is computed in

# What a pass sums up. Values as in csrc/core/rule.h.
NOTHING, ABS, SQUARES = range(3)
# What a pass reads and writes, as bits: parameter, gradient, states.
PARAM, GRAD, STATE = 1, 2, 4
EVERYTHING = 127

Function = Any  # of triton.jit: a compiled one, or the interpreter's


@dataclass(frozen=True)
class Streams:
    """What a pass reads and writes, as bits, and whether it is handed what draws() says."""

    reads: int = EVERYTHING
    writes: int = EVERYTHING & ~GRAD
    draws: bool = False

    def of(self, states: int, *, reads_grad: bool = True) -> tuple[int, int]:
        """The same, as far as there are such streams."""
        there = PARAM | GRAD * reads_grad | STATE * ((1 << states) - 1)
        return self.reads & there, self.writes & there


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
        sources: the passes before apply.
        passes, applies: the streams that each pass and apply touch.
        sums: what each pass sums up, given the hyper-parameters.
        reads_param: whether the passes read the parameter, given the hyper-parameters.
        keeps_scale: whether it wants to know the first pass's sum of the step before.
        keeps_value: whether the first pass's value is its state 0, however that is rounded.
        draws: what is drawn (draw.py), given the hyper-parameters; a seed's halves come last there.
        again, taken: see above; for each of the first passes.
        looks, takes: the streams that they touch; what `takes` reads is for again(), too.
        scales: for each of the first passes, the place of the two constants that a compressor with
            a scale per block has in place of the pass's sum.
        marking: name of its form for compressors that select, where that is a rule of its own.
        marks: whether the last state is a byte per element that the plan provides, for a step.
        freezes: whether nothing is selected where its first hyper-parameter is 0.
        absorbs: whether its first pass can take gradients in before the step, one by one; the step
            then has the pass's value from again(). Its first hyper-parameter is lr.
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
    sources: tuple[Function, ...] = ()
    passes: tuple[Streams, ...] = ()
    applies: Streams = Streams()
    sums: Callable[[Sequence[float]], tuple[int, ...]] = lambda _: ()
    reads_param: Callable[[Sequence[float]], bool] = lambda _: True
    keeps_scale: bool = False
    keeps_value: bool = False
    draws: Callable[[Sequence[float]], int] = lambda _: 0
    again: tuple[Function, ...] = ()
    taken: tuple[Function, ...] = ()
    looks: tuple[Streams, ...] = ()
    takes: tuple[Streams, ...] = ()
    scales: tuple[int, ...] = ()
    marking: str = ""
    marks: bool = False
    freezes: bool = False
    absorbs: bool = False
