"""From a live torch.optim optimizer to its fused twin, and back."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..engine.recipe import ClipMode, Policy
from ._base import FusedOptimizer
from ._names import TAKES_NAMES
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .clip_sgd import ClipSGD

_TWINS: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.SGD: ClipSGD,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}
_TORCH = {fused: theirs for theirs, fused in _TWINS.items()}
_EVENTS = ("step", "state_dict", "load_state_dict")
_HOOKS = [f"_optimizer_{event}_{when}_hooks" for event in _EVENTS for when in ("pre", "post")]

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


def swap(
    optimizer: torch.optim.Optimizer,
    *,
    schedulers: Iterable[Any] | None = None,
    **options: Any,
) -> FusedOptimizer:
    r"""The fused twin of a torch optimizer in mid-training: the same numbers from the next step on.

    Equivalent to constructing the twin with the same groups and loading the state, and to handing
    schedulers and hooks over::

        twin = pysmooth.AdamW(optimizer.param_groups, **options)
        twin.load_state_dict(optimizer.state_dict())
        scheduler.optimizer = twin

    With `max_norm=` the clip moves into the step: drop the call of `clip_grad_norm_`. In float32 a
    step differs from torch's by at most three units in the last place of max(\|p\|, \|update\|).
    States of 16-bit parameters are float32 from here on, where torch rounds them to 16 bits. States
    of DTensors (FSDP2, tensor parallelism) stay DTensors with the parameter's placement.

    Call it between steps, before a framework wraps the optimizer (`accelerator.prepare`). The old
    optimizer keeps its states, and is left to be dropped: until then memory holds both.

    Args:
        optimizer: exactly a torch.optim.SGD, Adagrad, Adam or AdamW.
        schedulers: what has the optimizer as its `optimizer`, and is to have the twin. None: every
            torch learning rate scheduler that has it; the garbage collector knows them all.
        options: arguments of the twin that torch's class lacks: `max_norm`, `clip`, `nonfinite`,
            `state_dtype`, `backend`, ... They hold for all groups.

    Raises:
        TypeError: the optimizer has no twin, or an option is one that the groups bring along.
        ValueError: `differentiable=True`, a sparse gradient, a scheduler of another optimizer, or
            what the twin's constructor refuses. Everything is as it was.
    """
    kind = _TWINS.get(type(optimizer))
    if kind is None:
        known = ", ".join(f"torch.optim.{theirs.__name__}" for theirs in _TWINS)
        raise TypeError(
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__} has no fused twin; "
            f"{known} have one (unwrapped, and no subclasses, whose steps may differ)"
        )
    for name in options.keys() & optimizer.defaults.keys():
        raise TypeError(f"swap() takes {name} from the optimizer's groups")
    for index, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise ValueError(
                f"group {index} has differentiable=True, which has no twin: the step is in place"
            )
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.grad.layout != torch.strided:
                named = group.get("param_names")
                label = repr(named[i]) if named else f"{i} of group {index}"
                raise ValueError(f"the gradient of parameter {label} is sparse: no twin takes that")
    capturable = any(group.get("capturable") for group in optimizer.param_groups)
    return _exchange(optimizer, kind, schedulers, {"capturable": capturable}, options)


def unswap(
    optimizer: FusedOptimizer,
    *,
    schedulers: Iterable[Any] | None = None,
    drop: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The torch optimizer that `swap` would have made this one of, with its states and schedulers.

    Args:
        optimizer: exactly a pysmooth.ClipSGD, Adagrad, Adam or AdamW.
        schedulers: as in `swap`.
        drop: what the optimizer does, torch's does not, and is to be let go: of "clip" (call
            `clip_grad_norm_` before the step instead), "nonfinite", "state_dtype",
            "master_weights", "kahan", "stochastic_rounding", "decoupled_weight_decay".

    Raises:
        TypeError: the optimizer has no twin in torch.
        ValueError: the step does something that torch's does not, and `drop` does not name it.
            Everything is as it was.
    """
    kind = _TORCH.get(type(optimizer))
    if kind is None:
        raise TypeError(f"pysmooth.{type(optimizer).__name__} has no twin in torch.optim")
    takes = inspect.signature(kind).parameters
    for index, group in enumerate(optimizer.param_groups):
        recipe = optimizer.recipe(group)
        does = {
            "clip": recipe.clip.mode != ClipMode.NONE or recipe.clip.value >= 0,
            "nonfinite": optimizer.policy != Policy.PROPAGATE,
            "state_dtype": bool(recipe.low_states),
            **{key: group[key] for key in ("master_weights", "kahan", "stochastic_rounding")},
            "decoupled_weight_decay": group.get("decoupled_weight_decay", False)
            and group["weight_decay"] != 0
            and kind is not torch.optim.AdamW
            and "decoupled_weight_decay" not in takes,
        }
        for name in does:
            if does[name] and name not in drop:
                raise ValueError(
                    f"torch.optim.{kind.__name__} has no counterpart of {name}, which group "
                    f"{index} uses: drop=[{name!r}] goes on without it"
                )
    return _exchange(optimizer, kind, schedulers, {}, {})


def _exchange(
    optimizer: torch.optim.Optimizer,
    kind: type[AnyOptimizer],
    schedulers: Iterable[Any] | None,
    flags: dict[str, Any],
    options: dict[str, Any],
) -> AnyOptimizer:
    """Makes the twin; hands state, hooks and schedulers over when nothing can fail any more."""
    followers = _holders(optimizer) if schedulers is None else list(schedulers)
    for i, scheduler in enumerate(followers):
        if getattr(scheduler, "optimizer", None) is not optimizer:
            raise ValueError(f"schedulers[{i}] does not have this optimizer as its `optimizer`")
    takes = inspect.signature(kind).parameters
    # Left out is what pysmooth's class knows and torch's does not. Torch's switches (`foreach`)
    # wait in the twin's groups for the way back; what neither knows (`initial_lr`) comes along.
    fused = isinstance(optimizer, FusedOptimizer)
    left_out = optimizer.defaults.keys() - takes if fused else set()
    groups = [_group(group, left_out) for group in optimizer.param_groups]
    given = {**optimizer.defaults, **flags}
    given = {key: value for key, value in given.items() if key in takes}
    twin = kind(groups, **given, **options)
    if not fused:
        twin.defaults = {**optimizer.defaults, **twin.defaults}
    _load(twin, optimizer)
    for name in _HOOKS:
        if hasattr(optimizer, name):  # the same dict, so that handles still remove hooks
            setattr(twin, name, getattr(optimizer, name))
    _count_steps(twin, optimizer)
    for scheduler in followers:
        scheduler.optimizer = twin
    return twin


def _holders(optimizer: torch.optim.Optimizer) -> list[LRScheduler]:
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), LRScheduler) and thing.__dict__.get("optimizer") is optimizer
    ]


def _group(group: dict[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in left_out}
    if TAKES_NAMES and (names := kept.pop("param_names", None)) is not None:
        kept["params"] = list(zip(names, kept["params"], strict=True))
    return kept


def _load(twin: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> None:
    """Loads the states. Hooks of the user see no load; groups keep tensors (`lr`) as they are."""
    params: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    places = {p: i for i, p in enumerate(params)}
    fresh = dict(twin.state)
    held = [dict(group) for group in twin.param_groups]
    twin.load_state_dict(
        {
            "state": {places[p]: dict(state) for p, state in optimizer.state.items() if state},
            "param_groups": [
                {**group, "params": [places[p] for p in group["params"]]} for group in held
            ],
        }
    )
    for group, own in zip(twin.param_groups, held, strict=True):
        group.update(own)
    for (
        p,
        state,
    ) in fresh.items():  # torch's Adagrad makes states in its constructor, and only there
        if not twin.state.get(p):
            twin.state[p] = state


def _count_steps(twin: Any, optimizer: Any) -> None:
    """Lets schedulers see that the optimizer stepped before they did: they mark `step` for it."""
    if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    step = type(twin).step
    weak = weakref.ref(twin)  # an optimizer that held itself would live until a collection

    @wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        owner: Any = weak()
        owner._opt_called = True
        return step(owner, *args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    twin.step = counted
    if getattr(optimizer, "_opt_called", False):
        twin._opt_called = True
