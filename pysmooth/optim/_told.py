"""What an optimizer tells of the steps that it has taken."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..engine.backends import Engine
from ..engine.recipe import Scope


class TellsOfSteps:
    """The part of an optimizer that is asked after a step."""

    scope: Scope
    param_groups: list[dict[str, Any]]
    _engine: Engine | None
    _skipped: int

    def last_norm(self) -> Tensor | None:
        """The gradient norm that the last step took, before clipping.

        Shape () for scope "global", (number of groups,) for "group", (number of parameters,) for
        "tensor" (0 where there was no gradient). None if the step needed no norm: pass
        `max_norm=float("inf")` to have it taken without clipping. The step itself waits for
        nothing; reading the tensor may.
        """
        self._settle()
        norms = self._engine.norms() if self._engine is not None else None
        if norms is None:
            return None
        values = torch.as_tensor(norms, dtype=torch.float64).to(self._norm_dtype())
        return values[0] if self.scope == Scope.GLOBAL else values

    def last_clip_coef(self) -> Tensor | None:
        """What each parameter's gradient was multiplied by in the last step; None as above.

        Shape (number of parameters,), in the order of `param_groups`. For clip="agc" the smallest
        of the tensor's rows: 1 where none was clipped.
        """
        self._settle()
        coefs = self._engine.coefs() if self._engine is not None else None
        if coefs is None:
            return None
        return torch.as_tensor(coefs, dtype=torch.float64).to(self._norm_dtype())

    def skipped_steps(self) -> int:
        """How many steps `nonfinite="skip"` turned into no-ops since construction."""
        self._settle()
        return self._skipped

    def count_skipped(self) -> None:
        """Called by an engine for every step that it turned into a no-op."""
        self._skipped += 1

    def sums_from_backward(self) -> int:
        """For how many gradients the last step used sums that were taken in backward.

        Always 0 for `norm="in_step"` and on the eager backend. Sums are not used, and the gradient
        is read again, where it changed after backward.
        """
        return 0 if self._engine is None else self._engine.summed()

    @abstractmethod
    def _settle(self) -> None:
        """Takes in what the engine's device has left to tell."""

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _norm_dtype(self) -> torch.dtype:
        wide = (torch.float64, torch.complex128)
        return torch.float64 if any(p.dtype in wide for p in self._params()) else torch.float32
