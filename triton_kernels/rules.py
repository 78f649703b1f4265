"""The list of update rules. Adding one to the backend: write its module, name it here."""

from __future__ import annotations

from .math import (
    accumulator,
    adagrad,
    adam,
    clip21,
    ef21,
    ef_sgd,
    normalized_sgd,
    scale,
    sgd,
    sign,
)
from .rule import Rule

RULES: dict[str, Rule] = {
    rule.name: rule
    for family in (
        *(scale, sgd, adagrad, adam, sign, accumulator),
        *(normalized_sgd, clip21, ef_sgd, ef21),
    )
    for rule in family.RULES
}
