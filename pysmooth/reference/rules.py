"""apply, in eager torch: one function per update rule, the twin of csrc/core/math."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import scale, sgd

Update = Callable[..., Tensor]


@dataclass(frozen=True)
class EagerRule:
    """A rule by name, with the names of its hyper-parameters and its number of states."""

    name: str
    hyper: tuple[str, ...]
    states: int
    update: Update

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        hyper: Sequence[float],
        *,
        coef: Tensor | None,
        first: bool,
    ) -> None:
        """Updates `param` and `states` in place, computing in float32, or float64 for float64."""
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        p = param.to(compute)
        g = grad.to(compute)
        if coef is not None:
            g = g * coef.to(compute)
        new = self.update(p, g, states, **dict(zip(self.hyper, hyper, strict=True)), first=first)
        param.copy_(new)


RULES: dict[str, EagerRule] = {
    rule.name: rule
    for rule in (
        EagerRule("scale", ("coef",), 0, scale.update),
        EagerRule("sgd", sgd.HYPER, 0, sgd.update),
        EagerRule("sgd_momentum", sgd.HYPER, 1, sgd.update),
    )
}
