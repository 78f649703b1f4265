"""The list of update rules. Adding one to the backend: write its module, name it here."""

from __future__ import annotations

from collections.abc import Sequence

from .compress import MARKED
from .math import (
    accumulator,
    adagrad,
    adam,
    adgd,
    clip21,
    ef21,
    ef21_plus,
    ef_sgd,
    normalized_sgd,
    scale,
    sgd,
    sign,
    stm,
)
from .rule import Rule

RULES: dict[str, Rule] = {
    rule.name: rule
    for family in (
        *(scale, sgd, adagrad, adam, sign, accumulator),
        *(stm, adgd, normalized_sgd, clip21, ef_sgd, ef21, ef21_plus),
    )
    for rule in family.RULES
}


def rule_for(name: str, hyper: Sequence[float]) -> str:
    """The rule of this name, or its form that marks coordinates, for compressors that select."""
    rule = RULES[name]
    if rule.marking and hyper[rule.hyper.index("compressor")] == MARKED.value:
        return rule.marking
    return name
