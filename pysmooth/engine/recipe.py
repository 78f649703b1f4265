"""What an optimizer tells an engine: which rule, which hyper-parameters, which clip."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

STEP = "step"
NORM_SQ = "norm_sq"
SCALE = "scale"
# States that are one number, whatever the parameter's shape.
SCALARS = {NORM_SQ: torch.float64, SCALE: torch.float64, STEP: torch.float32}
GRADIENT = "gradient"


class Scope(IntEnum):
    """Over which gradients a clip norm is taken. Values as in csrc/cpu/run.h."""

    GLOBAL = 0
    GROUP = 1
    TENSOR = 2


class Policy(IntEnum):
    """What happens when a gradient is not finite. Values as in csrc/cpu/run.h."""

    PROPAGATE = 0
    SKIP = 1
    RAISE = 2
    ZERO = 3

    @property
    def asks_first(self) -> bool:
        """Whether a step has to know first if all gradients are finite."""
        return self in (Policy.SKIP, Policy.RAISE)


class ClipMode(IntEnum):
    """The clip coefficient's formula. Values as in csrc/core/math/clip.h."""

    NONE = 0
    HARD = 1
    SMOOTH = 2
    NORMALIZE = 3
    SMOOTHNESS = 4


class ClipSpec(NamedTuple):
    """What becomes of one group's gradients before the rule, in the order the kernels take it.

    `value` bounds the coordinates, after the coefficient; negative: no bound. `maximize` negates.
    """

    mode: ClipMode = ClipMode.NONE
    max_norm: float = 0.0
    eps: float = 0.0
    l0: float = 0.0
    l1: float = 0.0
    value: float = -1.0
    maximize: bool = False


class Recipe(NamedTuple):
    """One group's step.

    Attributes:
        rule: name of the update rule, known to every backend.
        hyper: its hyper-parameters, in the order that the rule publishes.
        states: keys of its state tensors in `optimizer.state[p]`.
        clip: what becomes of the gradient before the rule.
        counts_steps: whether `optimizer.state[p]["step"]` counts the steps, in a float32 tensor of
            shape () as torch keeps it.
        accumulates: whether `optimizer.state[p]["norm_sq"]` accumulates the squared norm of the
            clipped gradients of a scope unit, in a float64 tensor of shape ().
        keeps_scale: whether `optimizer.state[p]["scale"]` keeps the sum of the first pass, in a
            float64 tensor of shape ().
        init: what the states are filled with when they are allocated: a number or, for `GRADIENT`,
            the gradient; zero where it is too short.
        low_states: keys of states that are kept in bfloat16, rounded stochastically.
        selects: whether coordinates are selected, by the optimizer's compressor.
    """

    rule: str
    hyper: tuple[float, ...]
    states: tuple[str, ...] = ()
    clip: ClipSpec = ClipSpec()
    counts_steps: bool = False
    accumulates: bool = False
    keeps_scale: bool = False
    init: tuple[float | str, ...] = ()
    selects: bool = False
    low_states: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys in `optimizer.state[p]`: numbers come last."""
        has = (self.accumulates, self.keeps_scale, self.counts_steps)
        numbers = zip((NORM_SQ, SCALE, STEP), has, strict=True)
        return (*self.states, *(key for key, held in numbers if held))

    def initial(self, key: str) -> float | str:
        """What a new state is filled with."""
        index = self.keys.index(key)
        return self.init[index] if index < len(self.init) else 0.0
