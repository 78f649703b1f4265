"""What groups said in the last step, while they still say the same.

After a backward, caches hold nothing of the step: each Python function that need not run again
saves microseconds there, which is what a small model's step consists of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from operator import is_
from typing import Any

import torch

from ..engine.recipe import Recipe

_FIXED = (float, int, bool, str, type(None), torch.dtype)
# Lists, but no recipe is made of them.
_APART = ("params", "param_names")


class KeepsRecipes:
    """The part of an optimizer that has recipes made, or knows that they would be the same."""

    # Whether a group's recipe depends on nothing but the group: it is then not made again while
    # the group is as it was. Not inherited by a class with a `recipe` of its own.
    groups_say_all = False
    param_groups: list[dict[str, Any]]
    _known: KnownRecipes | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A recipe that a subclass changes may look at more than the group."""
        super().__init_subclass__(**kwargs)
        if "recipe" in cls.__dict__ and "groups_say_all" not in cls.__dict__:
            cls.groups_say_all = False

    def recipes(self) -> list[Recipe]:
        """The steps of all groups, with how their parameters are kept.

        The same list as in the last step where nothing has changed.
        """
        known, groups = self._known, self.param_groups
        if known is not None and known.hold(groups):
            return known.recipes
        made = [self._made(group) for group in groups]
        keeps = self.groups_say_all and keepable(groups)
        self._known = KnownRecipes(groups, made) if keeps else None
        return made

    @abstractmethod
    def _made(self, group: dict[str, Any]) -> Recipe:
        """A group's recipe, anew."""


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
