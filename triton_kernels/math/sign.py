"""Steps along signs. Twin of csrc/core/math/sign.h."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it

from ..ops import sign_of
from ..rule import ABS, GRAD, PARAM, STAGE, STATE, Rule, Streams


@triton.jit
def prepare(h, x):
    """lr, momentum, 1 - momentum, shrink."""
    lr, momentum, weight_decay = h
    return lr, momentum, 1.0 - momentum, 1.0 - lr * weight_decay


@triton.jit
def update(p, g, s, h):
    """P = (1 - lr * weight_decay) * p - lr * sign(g)."""
    lr, _, _, shrink = h
    return p * shrink - sign_of(g) * lr, s


@triton.jit
def update_momentum(p, g, s, h):
    """The same along m = momentum * m + (1 - momentum) * g."""
    lr, keep, admit, shrink = h
    m = s[0] * keep + g * admit
    return p * shrink - sign_of(m) * lr, (m,)


@triton.jit
def prepare_lion(h, x):
    """lr, beta1, 1 - beta1, beta2, 1 - beta2, shrink."""
    lr, beta1, beta2, weight_decay = h
    return lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 - lr * weight_decay


@triton.jit
def update_lion(p, g, s, h):
    """Along the sign of one average; the state is another."""
    lr, keep1, admit1, keep2, admit2, shrink = h
    direction = s[0] * keep1 + g * admit1
    return p * shrink - sign_of(direction) * lr, (s[0] * keep2 + g * admit2,)


@triton.jit
def prepare_scaled(h, x):
    """lr * mean |d|, momentum, 1 - momentum, shrink."""
    lr, momentum, weight_decay = h
    return lr * x[STAGE], momentum, 1.0 - momentum, 1.0 - lr * weight_decay


@triton.jit
def source(p, g, s, h):
    """The gradient, of which the mean magnitude is taken."""
    return g, p, s


@triton.jit
def source_momentum(p, g, s, h):
    """The same of the momentum."""
    m = s[0] * h[1] + g * h[2]
    return m, p, (m,)


@triton.jit
def update_scaled_momentum(p, g, s, h):
    """Along the sign of the momentum."""
    return p * h[3] - sign_of(s[0]) * h[0], s


HYPER = ("lr", "momentum", "weight_decay")

RULES = (
    Rule(
        "scaled_sign_sgd",
        HYPER,
        0,
        prepare_scaled,
        update,
        4,
        sources=(source,),
        passes=(Streams(GRAD, 0),),
        sums=lambda _: (ABS,),
    ),
    Rule(
        "scaled_signum",
        HYPER,
        1,
        prepare_scaled,
        update_scaled_momentum,
        4,
        sources=(source_momentum,),
        passes=(Streams(GRAD | STATE, STATE),),
        applies=Streams(PARAM | STATE, PARAM),
        sums=lambda _: (ABS,),
    ),
    Rule("sign_sgd", HYPER, 0, prepare, update, 4),
    Rule("signum", HYPER, 1, prepare, update_momentum, 4),
    Rule("lion", ("lr", "beta1", "beta2", "weight_decay"), 1, prepare_lion, update_lion, 6),
)
