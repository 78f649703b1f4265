"""staging, in eager torch: what a rule computes with, and what storage makes of its results.

How 16-bit parameters are kept: csrc/core/param_storage.h. Twin of csrc/cpu/staging.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .random import round_stochastically

_PASS = 8  # two turns for each of the pairs that csrc/core/random.h counts


def compute_dtype(param: Tensor) -> torch.dtype:
    """What a rule computes in: float32, or float64 for float64.

    Args:
        param: the parameter.
    """
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass
class Storage:
    """One parameter's tensors, and how they are kept.

    Attributes:
        p: the parameter.
        states: the tensors of its rule.
        low: which of the states are bfloat16, rounded stochastically.
        kind: "PLAIN", "MASTER", "KAHAN" or "STOCHASTIC".
        companion: the tensor that goes with the parameter, for the second and third.
        step: how many steps were before.
        number: the parameter's place among all of the optimizer.
    """

    p: Tensor
    states: Sequence[Tensor]
    low: Sequence[bool]
    kind: str
    companion: Tensor | None
    step: int
    number: int

    def load(self) -> tuple[Tensor, list[Tensor]]:
        """The values of parameter and states, in the dtype that rules compute in.

        Those that are stored so are no copies: changes in place are kept.
        """
        states = [s.float() if low else s for s, low in zip(self.states, self.low, strict=True)]
        return self._value(self.p, self.companion), states

    def keep(self, x: Tensor, states: Sequence[Tensor]) -> None:
        """Stores what a step has made of the values."""
        if x is not self.p:
            # A rule's scalars are float64, and so is what it makes of parameters of shape ().
            self._store(self.p, self.companion, x.to(compute_dtype(self.p)), 0)
        for k, (kept, state) in enumerate(zip(self.states, states, strict=True)):
            if self.low[k]:
                kept.copy_(self._rounded(state, 1 + k, 0))

    def settled_param(self, x: Tensor) -> Tensor:
        """What is left of a new parameter that pass 0 stores, and that is changed again later."""
        p = torch.empty_like(self.p)
        companion = None if self.companion is None else torch.empty_like(self.companion)
        self._store(p, companion, x, 1)
        return self._value(p, companion)

    def settled_state(self, k: int, state: Tensor) -> Tensor:
        """The same for a state."""
        return self._rounded(state, 1 + k, 1).to(state.dtype) if self.low[k] else state

    def _value(self, p: Tensor, companion: Tensor | None) -> Tensor:
        if self.kind == "MASTER" and companion is not None:
            return companion
        x = p.to(compute_dtype(p))
        return x if companion is None else x + companion.float()

    def _store(self, p: Tensor, companion: Tensor | None, x: Tensor, stage: int) -> None:
        if self.kind == "KAHAN" and companion is not None:
            q = x.to(p.dtype).float()
            y = torch.where(q.isfinite(), q + (x - q).to(p.dtype).float(), x)
            p.copy_(y)
            companion.copy_(torch.where(p.isfinite(), y - p.float(), 0.0))
            return
        p.copy_(self._rounded(x, 0, stage) if self.kind == "STOCHASTIC" else x)
        if companion is not None:
            companion.copy_(x)

    def _rounded(self, x: Tensor, operand: int, stage: int) -> Tensor:
        # Operands that are rounded so take turns: the parameter, then states.
        noisy = [self.kind == "STOCHASTIC", *self.low]
        turn = sum(noisy[:operand]) + _PASS * stage
        return round_stochastically(x, step=self.step, tensor_id=self.number, turn=turn)
