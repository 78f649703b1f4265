"""What an optimizer tells an engine: which rule, which hyper-parameters, which clip."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


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


class ClipMode(IntEnum):
    """The clip coefficient's formula. Values as in csrc/core/math/clip.h."""

    NONE = 0
    HARD = 1
    SMOOTH = 2
    NORMALIZE = 3
    SMOOTHNESS = 4


class ClipSpec(NamedTuple):
    """One group's clip: the formula and its constants, in the order the kernels take them."""

    mode: ClipMode = ClipMode.NONE
    max_norm: float = 0.0
    eps: float = 0.0
    l0: float = 0.0
    l1: float = 0.0


class Recipe(NamedTuple):
    """One group's step.

    Attributes:
        rule: name of the update rule, known to every backend.
        hyper: its hyper-parameters, in the order that the rule publishes.
        states: keys of its state tensors in `optimizer.state[p]`.
        clip: what becomes of the gradient's norm.
    """

    rule: str
    hyper: tuple[float, ...]
    states: tuple[str, ...] = ()
    clip: ClipSpec = ClipSpec()
