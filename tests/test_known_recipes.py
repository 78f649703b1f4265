"""A group that was not changed is not asked again; one that was, in whatever way, is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from pysmooth import Adam, ClipSGD
from pysmooth.engine.recipe import Recipe


def made(**kwargs: Any) -> tuple[Parameter, ClipSGD]:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, ClipSGD([p], 0.5, **kwargs)


def test_recipes_are_kept_while_nothing_is_set() -> None:
    p, optimizer = made(momentum=0.9, max_norm=1.0)
    optimizer.step()
    kept = optimizer.recipes()
    optimizer.step()
    assert optimizer.recipes() is kept
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.25})
    assert [recipe.hyper[0] for recipe in optimizer.recipes()] == [0.5, 0.25]
    assert p.isfinite().all()


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "max_norm"])
def test_what_is_set_counts_in_the_next_step(key: str) -> None:
    ours, theirs = made(momentum=0.5, max_norm=1.0), made(momentum=0.5, max_norm=1.0)
    for value in (0.25, 0.125, 0.125, 0.25):
        for _, optimizer in (ours, theirs):
            optimizer.param_groups[0][key] = value
        theirs[1]._known = None
        ours[1].step()
        theirs[1].step()
        assert torch.equal(ours[0], theirs[0])
    assert ours[1].recipes()[0] == theirs[1].recipes()[0]


def test_groups_put_in_or_taken_out_by_hand_count() -> None:
    _, optimizer = made(max_norm=1.0)
    optimizer.recipes()
    other = {**optimizer.param_groups[0], "params": [Parameter(torch.ones(2))], "lr": 0.25}
    optimizer.param_groups.append(other)
    assert [recipe.hyper[0] for recipe in optimizer.recipes()] == [0.5, 0.25]
    del optimizer.param_groups[0]
    assert [recipe.hyper[0] for recipe in optimizer.recipes()] == [0.25]


def test_tuples_of_numbers_are_kept_with_their_group() -> None:
    adam = Adam([Parameter(torch.ones(3))], betas=(0.5, 0.75))
    kept = adam.recipes()
    assert adam.recipes() is kept
    adam.param_groups[0]["betas"] = (0.25, 0.75)
    assert adam.recipes()[0].hyper[1:3] == (0.25, 0.75)


def test_other_keys_with_the_same_values_are_other_values() -> None:
    """As in a checkpoint whose groups were written in another order."""
    _, optimizer = made(max_norm=1.0)
    (group,) = optimizer.param_groups
    group["nesterov"], group["maximize"] = False, False
    first = optimizer.recipes()[0]
    assert not first.clip.maximize
    swapped = {"nesterov": "decoupled_weight_decay", "decoupled_weight_decay": "nesterov"}
    group["decoupled_weight_decay"] = True
    before = optimizer.recipes()[0]
    optimizer.param_groups[0] = {swapped.get(k, k): v for k, v in group.items()}
    after = optimizer.recipes()[0]
    assert (before.hyper[3], before.hyper[5]) == (0.0, 1.0)
    assert (after.hyper[3], after.hyper[5]) == (1.0, 0.0)


def test_what_can_change_without_being_set_is_asked_every_time() -> None:
    lr = torch.tensor(0.5)
    p = Parameter(torch.zeros(2))
    optimizer = ClipSGD([p], lr)
    for factor in (1.0, 0.5):
        lr.fill_(factor)
        p.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(p, torch.full((2,), -1.5))

    betas = [0.5, 0.75]
    adam = Adam([p], betas=betas)  # type: ignore[arg-type]
    assert adam.recipes()[0].hyper[1:3] == (0.5, 0.75)
    betas[0] = 0.25
    assert adam.recipes()[0].hyper[1:3] == (0.25, 0.75)


def test_a_subclass_may_look_at_more_than_the_group() -> None:
    class Halving(ClipSGD):
        steps = 0

        def recipe(self, group: dict[str, Any]) -> Recipe:
            self.steps += 1
            plain = super().recipe(group)
            return plain._replace(hyper=(2.0**-self.steps, *plain.hyper[1:]))

    p = Parameter(torch.zeros(1))
    optimizer = Halving([p], 1.0)
    assert not Halving.groups_say_all
    rates = [optimizer.recipes()[0].hyper[0] for _ in range(3)]
    assert rates[0] > rates[1] > rates[2]
