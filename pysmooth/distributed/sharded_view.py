"""An optimizer over DTensors as an engine is to see it: plain tensors with plain states.

Each step asks which gradients there are, and whether the optimizer's states are those that it was
shown last; the rest is done where they are not.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..engine.recipe import SCALARS
from ..optim._managed import part_here

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Where nobody imported them there are none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def like(param: Any, local: Tensor) -> Tensor:
    """A DTensor around a local part, with the parameter's shape and placement."""
    from torch.distributed.tensor import DTensor

    shown = DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    shown._local_tensor = local  # from_local made a view; the plan knows this very tensor
    return shown


class _Held:
    """A state dict, with what was in it; or that there was none."""

    __slots__ = ("_dict", "_values")

    def __init__(self) -> None:
        self._dict: object = self  # nothing that anybody can ask about
        self._values: tuple[object, ...] = ()

    def keep(self, held: Mapping[str, Any] | None) -> None:
        self._dict, self._values = held, () if held is None else tuple(held.values())

    def forget(self) -> None:
        self._dict = self

    def is_as_it_was(self, held: Mapping[str, Any] | None) -> bool:
        """Whether it is the same dict, with the same objects in it."""
        if held is not self._dict:
            return False
        values = self._values
        return held is None or (len(held) == len(values) and all(map(is_, held.values(), values)))


class _Pair:
    """A DTensor and its local part, with what either's state was after the last step."""

    __slots__ = ("inner", "kind", "local", "outer", "param", "placements")

    def __init__(self, param: Any, local: Tensor) -> None:
        self.param, self.local = param, local
        self.kind, self.placements = type(param.data), param.placements
        self.outer, self.inner = _Held(), _Held()

    def take_gradient(self) -> bool:
        """Hands the local part of the gradient to the local part; whether there is one."""
        g = self.param.grad
        if g is None:
            self.local.grad = None
        elif type(g) is self.kind and g._spec.placements == self.placements:
            self.local.grad = g._local_tensor
        else:
            self.local.grad = _gradient(self.param)
        return g is not None


class View:
    """The optimizer, with local parts in the place of its parameters, and states of their own."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self.lists = [list(group["params"]) for group in optimizer.param_groups]
        self.pairs: list[_Pair] = []
        self.param_groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            members = []
            for p in group["params"]:
                local = part_here(p)
                if local is not p:
                    local.requires_grad_(p.requires_grad)
                    self.pairs.append(_Pair(p, local))
                members.append(local)
            self.param_groups.append({**group, "params": members})
        self.plain = [p for ps in self.lists for p in ps if not is_dtensor(p)]
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def of(self, optimizer: FusedOptimizer) -> bool:
        """Whether it still shows the optimizer's parameters."""
        groups = optimizer.param_groups
        return (
            len(groups) == len(self.lists)
            and all(
                len(group["params"]) == len(known) and all(map(is_, group["params"], known))
                for group, known in zip(groups, self.lists, strict=True)
            )
            and all(q.param._local_tensor.data_ptr() == q.local.data_ptr() for q in self.pairs)
        )

    def pull(self) -> list[bool]:
        """Takes over gradients, and what was changed from outside. Which of all have a gradient."""
        for mine, group in zip(self.param_groups, self._optimizer.param_groups, strict=True):
            mine.update((key, value) for key, value in group.items() if key != "params")
        held = self._optimizer.state
        for pair in self.pairs:
            pair.take_gradient()
            outer = held.get(pair.param)
            if not pair.outer.is_as_it_was(outer):
                self._take_over(pair, outer)
        for p in self.plain:
            if p in held:
                self.state[p] = held[p]
            else:
                self.state.pop(p, None)
        return [p.grad is not None for group in self.param_groups for p in group["params"]]

    def _take_over(self, pair: _Pair, outer: dict[str, Any] | None) -> None:
        pair.inner.forget()
        if outer is None:
            self.state.pop(pair.local, None)
            return
        mine = self.state[pair.local]
        for key in [key for key in mine if key not in outer]:
            del mine[key]
        for key, value in outer.items():
            mine[key] = value._local_tensor if is_dtensor(value) else value

    def push(self) -> None:
        """Shows the states that the step allocated, or took away."""
        held, state = self._optimizer.state, self.state
        for pair in self.pairs:
            pair.local.grad = None
            mine = state.get(pair.local)
            if not pair.inner.is_as_it_was(mine):
                self._show(pair, mine)
        for p in self.plain:
            if p in state:
                held[p] = state[p]
            else:
                held.pop(p, None)

    def _show(self, pair: _Pair, mine: dict[str, Any] | None) -> None:
        held = self._optimizer.state
        if mine is None:
            held.pop(pair.param, None)
        else:
            outer = held[pair.param]
            for key in [key for key in outer if key not in mine]:
                del outer[key]
            for key, value in mine.items():
                known = outer.get(key)
                inner = known._local_tensor if is_dtensor(known) else known
                if inner is not value:
                    outer[key] = value if _is_number(key, value) else like(pair.param, value)
        pair.inner.keep(mine)
        pair.outer.keep(held.get(pair.param))

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """Takes states from the optimizer that are taken from here meanwhile."""
        before = {p: set(keys) for p, keys in self.state.items()}
        pairs = [(pair.param, pair.local) for pair in self.pairs]
        try:
            yield
        finally:
            for p, local in [*pairs, *((p, p) for p in self.plain)]:
                lost = before.get(local, set()) - self.state.get(local, {}).keys()
                held = self._optimizer.state.get(p)
                if not lost or held is None:
                    continue
                for key in lost:
                    held.pop(key, None)
                if not held:
                    del self._optimizer.state[p]


def _is_number(key: str, value: object) -> bool:
    return key in SCALARS or not isinstance(value, Tensor)


def _gradient(p: Any) -> Tensor:
    """The local part of a gradient, with its parameter's placement."""
    g = p.grad
    if not is_dtensor(g):
        raise ValueError("a DTensor parameter has a gradient that is not a DTensor")
    if g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
        g = g.to_local()
        return cast(Tensor, g.wait() if hasattr(g, "wait") else g)
    return cast(Tensor, g._local_tensor)
