"""What an optimizer tells an engine: which rule, which hyper-parameters, which clip."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

STEP = "step"
NORM_SQ = "norm_sq"
SCALE = "scale"
ELSEWHERE = "a parameter of another pipeline stage"  # in messages
# States that are one number, whatever the parameter's shape.
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SCALARS = {NORM_SQ: torch.float64, SCALE: torch.float64, STEP: torch.float32}
GRADIENT = "gradient"
# Beside a parameter's states, a plain number: how many gradients they have taken in since the last
# step. Named in csrc/bindings/plan.cpp as well.
ABSORBED = "absorbed"
PARAMETER = "parameter"


class Scope(IntEnum):
    """Over which gradients a clip norm is taken. Values as in csrc/core/step.h."""

    GLOBAL = 0
    GROUP = 1
    TENSOR = 2
    BLOCK = 3  # of consecutive elements: scales of compressors alone


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
    AGC = 5


class ParamStorage(IntEnum):
    """How 16-bit parameters keep what they cannot hold. Values as in csrc/core/param_storage.h."""

    PLAIN = 0
    MASTER = 1
    KAHAN = 2
    STOCHASTIC = 3

    @property
    def companion(self) -> str | None:
        """The key of the state that goes with the parameter."""
        return {ParamStorage.MASTER: MASTER, ParamStorage.KAHAN: COMPENSATION}.get(self)


MASTER = "master_param"
COMPENSATION = "compensation"


class ClipSpec(NamedTuple):
    """What becomes of one group's gradients before the rule, in the order the kernels take it.

    `value` bounds the coordinates, after the coefficient; negative: no bound. `maximize` negates.
    For AGC `max_norm` is in units of the parameter's norm, and `eps` the least that counts as such.
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
        init: what the rule's states are filled with when they are allocated: a number or, for
            `GRADIENT`, the gradient; zero where it is too short.
        low_states: keys of states that are kept in bfloat16, rounded stochastically.
        selects: whether coordinates are selected, by the optimizer's compressor.
        param_storage: how 16-bit parameters are kept.
        scales_blocks: whether the optimizer's compressor has a scale per block.
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
    param_storage: ParamStorage = ParamStorage.PLAIN
    scales_blocks: bool = False

    def of(self, param: Tensor) -> Recipe:
        """The recipe for one parameter: `param_storage` is for those of 16 bits."""
        if self.param_storage == ParamStorage.PLAIN or param.dtype in SIXTEEN_BITS:
            return self
        return self._replace(param_storage=ParamStorage.PLAIN)

    @property
    def keeps_step(self) -> bool:
        """Whether steps are counted: noise depends on them, too."""
        return self.counts_steps or self.param_storage == ParamStorage.STOCHASTIC

    @property
    def rule_keys(self) -> tuple[str, ...]:
        """Keys in `optimizer.state[p]` that the rule reads: numbers come last."""
        has = (self.accumulates, self.keeps_scale, self.counts_steps)
        numbers = zip((NORM_SQ, SCALE, STEP), has, strict=True)
        return (*self.states, *(key for key, held in numbers if held))

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys in `optimizer.state[p]`: the rule's tensors, the companion, the numbers."""
        keys, count = list(self.rule_keys), len(self.states)
        companion = self.param_storage.companion
        keys[count:count] = [] if companion is None else [companion]
        return (*keys, STEP) if self.keeps_step and not self.counts_steps else tuple(keys)

    def initial(self, key: str) -> float | str:
        """What a new state is filled with."""
        if key == MASTER:
            return PARAMETER
        own = self.rule_keys
        index = own.index(key) if key in own else len(self.init)
        return self.init[index] if index < len(self.init) else 0.0


def needs_reduce(policy: Policy, recipes: Iterable[Recipe]) -> bool:
    """Whether a step reads gradients first, for norms or to see if all of them are finite."""
    return policy.asks_first or any(r.clip.mode or r.accumulates for r in recipes)
