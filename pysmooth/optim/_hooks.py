"""Hooks that run when backward has finished a parameter's gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

Hook = Callable[[Tensor], None]
_Held = dict[Tensor, tuple[Hook, RemovableHandle]]


class GradientHooks:
    """One post-accumulate-grad hook on every parameter of an optimizer; gone when that is gone.

    Args:
        owner: the optimizer. It is referred to weakly.
        make: makes a parameter's hook, which must not keep the owner alive.
    """

    def __init__(self, owner: object, make: Callable[[], Hook]) -> None:
        self._make = make
        self._held: _Held = {}
        self._frozen: list[Tensor] = []  # they cannot have a hook yet
        weakref.finalize(owner, _remove, self._held).atexit = False

    def follow(self, params: Iterable[Tensor]) -> None:
        """Moves to these parameters: new ones get a hook, those that left lose it."""
        wanted = dict.fromkeys(params)
        _remove(self._held, [p for p in self._held if p not in wanted])
        self._frozen = [p for p in wanted if not p.requires_grad]
        for p in wanted:
            if p.requires_grad and p not in self._held:
                hook = self._make()
                handle = p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._held[p] = (hook, handle)

    @property
    def lacking(self) -> bool:
        """Whether parameters without a hook can have one now."""
        return any(p.requires_grad for p in self._frozen)

    def of(self, param: Tensor) -> Any:
        """The parameter's hook, or None."""
        return self._held.get(param, (None,))[0]

    def __len__(self) -> int:
        return len(self._held)


def _remove(held: _Held, params: Iterable[Tensor] | None = None) -> None:
    for p in list(held) if params is None else params:
        held.pop(p)[1].remove()
