"""A load of a state dict: everything that can fail happens before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.recipe import ABSORBED, SCALARS, STEP
from ..engine.state import new_states
from ._managed import part_here

if TYPE_CHECKING:
    from ._base import FusedOptimizer


class Load:
    """One load, as two hooks of torch's `load_state_dict`: `capture` before it, `restore` after."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._ready: list[tuple[Tensor, str, Tensor]] = []

    def capture(self, _: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
        """Checks everything, and copies states into memory of their own and their own dtype.

        What torch goes on with is whole from the first: it asks for recipes (`__setstate__`) before
        post-hooks run.
        """
        optimizer = self._optimizer
        groups = self._checked(incoming)
        here = [g["params"] for g in optimizer.param_groups]
        recipes = {
            p: recipe.of(p)
            for group, params in zip(groups, here, strict=True)
            for recipe in [optimizer._recipe({**group, "params": params})]
            for p in params
        }
        wanted = [
            (p, key, value)
            for p, saved in _pairs(optimizer, incoming)
            for key, value in saved.items()
            if key in (*recipes[p].keys, *optimizer.own_states) and value is not None
        ]
        with torch.no_grad():
            parts = {p: part_here(p) for p, _, _ in wanted}
            owned = new_states([(parts[p], key, recipes[p]) for p, key, _ in wanted])
            for (p, key, value), own in zip(wanted, owned, strict=True):
                # torch kept step counts as plain numbers once
                new = value if isinstance(value, Tensor) else torch.tensor(float(value))
                if parts[p] is not p and key not in SCALARS:
                    from ..distributed.sharded import loaded_state

                    self._ready.append((p, key, loaded_state(p, own, new, key)))
                else:
                    self._ready.append((p, key, own.copy_(new.reshape(own.shape))))
        return {**incoming, "param_groups": groups}

    def restore(self, _: torch.optim.Optimizer) -> None:
        """Puts those states in place of the ones that torch cast to the parameters' dtypes."""
        for p, key, own in self._ready:
            self._optimizer.state[p][key] = own

    def _checked(self, incoming: dict[str, Any]) -> list[dict[str, Any]]:
        """The groups that are to be loaded, with what they lack taken from those that are here."""
        optimizer = self._optimizer
        groups = _groups_of(incoming)
        sizes = [len(g["params"]) for g in groups]
        if sizes != [len(g["params"]) for g in optimizer.param_groups]:
            raise ValueError(
                f"state_dict has parameter groups of sizes {sizes}, the optimizer of sizes "
                f"{[len(g['params']) for g in optimizer.param_groups]}"
            )
        labels = dict(zip(map(id, optimizer._params()), optimizer.param_labels(), strict=True))
        merged = [
            {**old, **group, "params": old["params"]}
            for group, old in zip(groups, optimizer.param_groups, strict=True)
        ]
        for group in merged:
            optimizer._check(group)
        keys = {key for group in merged for key in optimizer._recipe(group).keys}
        keys |= {*optimizer.own_states}
        for p, saved in _pairs(optimizer, incoming):
            _check_states(p, saved, keys, labels[id(p)])
        return [
            {**old, **group, "params": group["params"]}
            for group, old in zip(groups, optimizer.param_groups, strict=True)
        ]


def _groups_of(incoming: Any) -> list[dict[str, Any]]:
    """The groups of a state dict, which has the form that torch gives it."""
    groups, state = (
        incoming.get(key) if isinstance(incoming, dict) else None
        for key in ("param_groups", "state")
    )
    if not isinstance(groups, list | tuple) or not isinstance(state, dict):
        raise ValueError("state_dict does not have a list 'param_groups' and a dict 'state'")
    for i, group in enumerate(groups):
        ids = group.get("params") if isinstance(group, dict) else None
        if not isinstance(ids, list | tuple) or not all(isinstance(n, int | str) for n in ids):
            raise ValueError(f"group {i} of state_dict has no list 'params' of numbers or names")
    ids = [n for group in groups for n in group["params"]]
    if len(set(ids)) < len(ids):
        raise ValueError("state_dict has a parameter more than once in its groups")
    for n, held in state.items():
        if not isinstance(held, dict):
            raise ValueError(f"state {n!r} in state_dict is not a dict")
        if isinstance(n, int) and n not in ids:
            raise ValueError(f"state {n} in state_dict is of no parameter in its groups")
    return list(groups)


def _check_states(p: Tensor, saved: dict[str, Any], keys: set[str], label: str) -> None:
    count = saved.get(ABSORBED, 0)
    if not isinstance(count, int) or not 0 <= count < 2**63:
        raise ValueError(f"state 'absorbed' of parameter {label!r} in state_dict is not a count")
    for key in keys & saved.keys():
        value = saved[key]
        if value is None:
            continue
        if key in SCALARS:
            _check_scalar(key, value, label)
        elif not isinstance(value, Tensor) or value.shape != p.shape:
            raise ValueError(
                f"state {key!r} of parameter {label!r} in state_dict does not have the parameter's "
                f"shape {tuple(p.shape)}"
            )


def _check_scalar(key: str, value: Any, label: str) -> None:
    name = f"state {key!r} of parameter {label!r} in state_dict"
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain and not (isinstance(value, Tensor) and value.numel() == 1):
        raise ValueError(f"{name} is not one number")
    if key == STEP and not 0 <= float(value) < 2**63:  # false for NaN
        raise ValueError(f"{name} is not a count of steps; got {float(value)}")


def _pairs(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """The parameters that have states in a state dict, and these."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (p, state_dict["state"][i])
        for i, p in zip(ids, params, strict=True)
        if i in state_dict["state"]
    ]
