"""What a step is given of recipes, kept for as long as they are the same ones."""

from __future__ import annotations

from .recipe import ClipMode, Recipe


class Numbers:
    """The numbers of all groups, and what a plan is built for, apart from tensors.

    A list of recipes is replaced, never changed (optim/_known.py): whoever has the numbers of the
    list that it is given needs no others.

    Attributes:
        recipes: the list that it was made of.
        hypers: hyper-parameters, per group.
        clips: what becomes of gradients, per group.
        forms: what plans are made for, per group.
        late: whether kernels read a learning rate on their device.
    """

    def __init__(self, recipes: list[Recipe], *, late: bool = False) -> None:
        self.recipes = recipes
        self.hypers = [recipe.hyper for recipe in recipes]
        self.clips = [recipe.clip for recipe in recipes]
        self.forms: tuple[object, ...] = tuple(form_of(recipe) for recipe in recipes)
        self.late = late


def form_of(recipe: Recipe) -> tuple[object, ...]:
    """What a plan is made for, of a recipe."""
    return (
        recipe.rule,
        recipe.low_states,
        recipe.param_storage,
        recipe.clip.mode == ClipMode.AGC,
    )
