"""apply, in eager torch: one function per update rule, the twin of csrc/core/math."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import adagrad, adam, scale, sgd, sign

if TYPE_CHECKING:
    from ..engine.recipe import ClipSpec

Update = Callable[..., Tensor]


@dataclass(frozen=True)
class EagerRule:
    """A rule by name.

    Attributes:
        name: the same in every backend.
        hyper: names of its hyper-parameters.
        states: number of state tensors.
        update: the function of the new parameter; changes states in place.
        counts_steps: whether it takes the number of the step, `step`, from 1.
        takes_first: whether it takes `first`, true where the states hold nothing yet.
    """

    name: str
    hyper: tuple[str, ...]
    states: int
    update: Update
    counts_steps: bool = False
    takes_first: bool = False

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        hyper: Sequence[float],
        *,
        coef: Tensor | None,
        clip: ClipSpec,
        first: bool,
        step: float,
    ) -> None:
        """Updates `param` and `states` in place, computing in float32, or float64 for float64."""
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        p = param.to(compute)
        g = grad.to(compute)
        if coef is not None:
            g = g * coef.to(compute)
        if clip.maximize:
            g = -g
        if clip.value >= 0:
            g = g.clamp(-clip.value, clip.value)
        named: dict[str, float] = dict(zip(self.hyper, hyper, strict=True))
        if self.counts_steps:
            named["step"] = step
        if self.takes_first:
            named["first"] = first
        new = self.update(p, g, states, **named)
        param.copy_(new)


RULES: dict[str, EagerRule] = {
    rule.name: rule
    for rule in (
        EagerRule("scale", ("coef",), 0, scale.update),
        EagerRule("sgd", sgd.HYPER, 0, sgd.update, takes_first=True),
        EagerRule("sgd_momentum", sgd.HYPER, 1, sgd.update, takes_first=True),
        EagerRule("adagrad", adagrad.HYPER, 1, adagrad.update, counts_steps=True),
        EagerRule("adam", adam.HYPER, 2, adam.update, counts_steps=True),
        EagerRule("adam_amsgrad", adam.HYPER, 3, adam.update, counts_steps=True),
        EagerRule("sign_sgd", sign.HYPER, 0, sign.update),
        EagerRule("signum", sign.HYPER, 1, sign.update),
        EagerRule("lion", sign.LION_HYPER, 1, sign.lion),
    )
}
