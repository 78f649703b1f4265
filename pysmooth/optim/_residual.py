"""What the optimizers with a compressor share."""

from __future__ import annotations

from typing import Any, Literal

from ..compressors import Compressor, Dense, Select
from ..engine.recipe import Scope
from ._base import FusedOptimizer

# A residual never takes in what is not finite: there is no "propagate".
ResidualPolicy = Literal["skip", "raise", "zero"]


MARKS: Dense = (5, 0.0, 0)  # what takes a compressor's place where coordinates are selected


class CompressedOptimizer(FusedOptimizer):
    """An optimizer whose rule sends something through a compressor."""

    policies = ("skip", "raise", "zero")
    compressor: Compressor
    messages = 1  # how many the rule compresses, a pass each
    errors = 0  # of how many of them it then takes the error, per unit that the compressor looks at

    def set_compressor(self, compressor: object, norm_scope: Scope = Scope.GLOBAL) -> None:
        """Takes the compressor in; `norm_scope` is of the norm that a rule takes after it."""
        if not isinstance(compressor, Compressor) or not (compressor.select or compressor.dense):
            raise TypeError(f"compressor must be one of pysmooth.compressors; got {compressor!r}")
        self.compressor = compressor
        scales = Scope[compressor.scale_scope.upper()]
        unit = Scope.TENSOR if scales == Scope.BLOCK else scales
        self.stage_scopes = (*[scales] * self.messages, *[unit] * self.errors, norm_scope)

    def select_spec(self) -> Select | None:
        """How coordinates are selected, where they are; or how many share a scale."""
        block = self.compressor.scale_block
        return self.compressor.select if block is None else (0, 2, 0.0, 0, block, False, 0)

    def compression(self) -> tuple[float, ...]:
        """The compressor as hyper-parameters: kind, level, and the halves of a seed."""
        kind, level, seed = self.compressor.dense or MARKS
        return (float(kind), level, *halves(seed))

    def form(self) -> str:
        """How the rule uses the compressor."""
        return "dense" if self.compressor.select is None else "select"

    def selections(self) -> tuple[int, int]:
        """How many top-k selections the steps have made, and how many took a second look.

        A selection looks among the values that a sample lets expect to be large. Rarely these do
        not hold the k largest, and all values are read again: the result is exact either way.
        (0, 0) on the eager backend, which sorts.
        """
        return (0, 0) if self._engine is None else self._engine.selections()


def floats(group: dict[str, Any], *names: str) -> tuple[float, ...]:
    """The group's values of these names."""
    return tuple(float(group[name]) for name in names)


def halves(seed: int) -> tuple[float, float]:
    """A seed of 64 bits as two numbers that a float holds."""
    return float(seed & 0xFFFFFFFF), float(seed >> 32)
