"""What groups said in the last step, while they still say the same.

After a backward, caches hold nothing of the step: each Python function that need not run again
saves microseconds there, which is what a small model's step consists of.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch

from ..engine.recipe import Recipe

_FIXED = (float, int, bool, str, type(None), torch.dtype)
# Lists, but no recipe is made of them.
_APART = ("params", "param_names")


class KnownRecipes:
    """The recipes of groups whose values are the very objects that they were made of."""

    def __init__(self, groups: Iterable[dict[str, Any]], recipes: list[Recipe]) -> None:
        self.recipes = recipes
        self._keys = [tuple(group) for group in groups]
        self._values = [tuple(group.values()) for group in groups]

    def hold(self, groups: list[dict[str, Any]]) -> bool:
        """Whether nothing was set since: identity, since equal values may have other types."""
        if len(groups) != len(self._keys):
            return False
        for group, keys, values in zip(groups, self._keys, self._values, strict=True):
            if tuple(group) != keys or not all(map(is_, group.values(), values)):
                return False
        return True


def keepable(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether the groups' values cannot change without being set: a tensor can, or a list."""
    return all(
        isinstance(x, _FIXED)
        for group in groups
        for key, value in group.items()
        if key not in _APART
        for x in (value if type(value) is tuple else (value,))
    )
