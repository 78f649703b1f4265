"""What happens to an optimizer: drawn from a seed, then done to both worlds."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .worlds import LAYOUTS, Action, Form, World

SIZES = (0, 1, 1, 2, 3, 5, 8, 17)
SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3, 0.0)
BAD_NUMBERS = (float("nan"), -1.0, "0.1", None)


def draw_form(rng: random.Random, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Form:
    """A tensor of any shape and layout; now and then one of several chunks."""
    if shape is None:
        shape = tuple(rng.choice(SIZES) for _ in range(rng.randrange(4)))
        if rng.random() < 0.01:
            shape = (5003,)
    return Form(shape, dtype, rng.choice(LAYOUTS), rng.choice(SCALES), rng.getrandbits(32))


class ClosureError(Exception):
    """What a closure of the user's raises."""


# ---- gradients ----------------------------------------------------------------------------------


def gradients(rng: random.Random, world: World) -> Action:
    """New gradients for all parameters: none, of any layout, not finite, of a wrong shape."""
    plan: list[Callable[[Tensor], Tensor | None]] = []
    bad = rng.random()
    for p in world.params:
        shape = tuple(p.shape)
        form = draw_form(rng, p.dtype, shape)
        if rng.random() < 0.1:
            form = form._replace(layout="expanded")
        if rng.random() < 0.15:
            plan.append(lambda p: None)
        elif bad < 0.04:
            value = rng.choice((float("nan"), float("inf"), float("-inf")))
            plan.append(lambda p, form=form, value=value: _spoiled(form.make(), value))
        elif bad < 0.06 and p.numel() > 0:
            plan.append(lambda p, form=form: form._replace(layout="contiguous").make().to_sparse())
        elif bad < 0.08 and p.dtype.is_complex:
            plan.append(lambda p, form=form: form.make().conj())
        else:
            plan.append(lambda p, form=form: form.make())

    def act(world: World) -> None:
        for p, make in zip(world.params, plan, strict=True):
            p.grad = make(p)

    return act


def _spoiled(grad: Tensor, value: float) -> Tensor:
    if grad.numel():
        grad[(0,) * grad.ndim] = value
    return grad


# ---- steps --------------------------------------------------------------------------------------


def step(rng: random.Random, world: World) -> Action:
    """Gradients, and a step."""
    new = gradients(rng, world)

    def act(world: World) -> None:
        new(world)
        world.optimizer.step()

    return act


def step_again(rng: random.Random, world: World) -> Action:
    """A step with the gradients that are there."""
    return lambda world: world.optimizer.step()  # type: ignore[return-value]


def step_with_scaler(rng: random.Random, world: World) -> Action:
    """A step as GradScaler asks for it: scaled by a power of two, or with an overflow found."""
    scale, found = rng.choice((None, 0.5, 2.0)), float(rng.random() < 0.2)

    def act(world: World) -> None:
        optimizer: Any = world.optimizer
        optimizer.grad_scale = None if scale is None else torch.tensor(scale)
        optimizer.found_inf = torch.tensor(found)
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    return act


def closure_raises(rng: random.Random, world: World) -> Action:
    """A step whose closure, or whose hook, raises."""
    in_hook = rng.random() < 0.5

    def act(world: World) -> None:
        def refuse(*_: object) -> float:
            raise ClosureError

        try:
            if in_hook:
                handle = world.optimizer.register_step_pre_hook(refuse)  # type: ignore[arg-type]
                try:
                    world.optimizer.step()
                finally:
                    handle.remove()
            else:
                world.optimizer.step(refuse)
        except ClosureError:
            return
        raise AssertionError("what the closure raised was lost")

    return act


# ---- under its feet -----------------------------------------------------------------------------


def new_data(rng: random.Random, world: World) -> Action:
    """`p.data = ...`: another layout, now and then another shape."""
    i = rng.randrange(len(world.params))
    p = world.params[i]
    keep = rng.random() < 0.8 or p.numel() == 0
    form = draw_form(rng, p.dtype, tuple(p.shape) if keep else None)

    def act(world: World) -> None:
        world.params[i].data = form.make()
        world.params[i].grad = None

    return act


def freeze(rng: random.Random, world: World) -> Action:
    """Toggles requires_grad."""
    i = rng.randrange(len(world.params))

    def act(world: World) -> None:
        world.params[i].requires_grad_(not world.params[i].requires_grad)

    return act


def new_group(rng: random.Random, world: World) -> Action:
    """A group more; now and then of a parameter that is in another one, or of a view of it."""
    forms = [draw_form(rng, world.params[0].dtype) for _ in range(rng.randrange(3))]
    how, lr = rng.random(), rng.choice((0.05, 0.2, *BAD_NUMBERS))

    def act(world: World) -> None:
        new = [torch.nn.Parameter(form.make()) for form in forms]
        if how < 0.1:
            new.append(world.params[0])
        elif how < 0.2:
            new.append(torch.nn.Parameter(world.params[0].detach()))
        world.optimizer.add_param_group({"params": new, "lr": lr})
        world.params = [p for group in world.optimizer.param_groups for p in group["params"]]

    return act


def edit_group(rng: random.Random, world: World) -> Action:
    """Edits a group's list, as torch never stops anyone from doing."""
    g, how = rng.randrange(len(world.optimizer.param_groups)), rng.randrange(3)
    form = draw_form(rng, world.params[0].dtype)

    def act(world: World) -> None:
        listed = world.optimizer.param_groups[g]["params"]
        if how == 0:
            listed.append(torch.nn.Parameter(form.make()))
        elif how == 1:
            listed.reverse()
        elif len(world.params) > 1 and listed:
            world.optimizer.state.pop(listed.pop(0), None)
        world.params = [p for group in world.optimizer.param_groups for p in group["params"]]

    return act


def hyper(rng: random.Random, world: World) -> Action:
    """Another learning rate or clip; now and then one that makes no sense, and then back."""
    g = rng.randrange(len(world.optimizer.param_groups))
    group = world.optimizer.param_groups[g]
    key = rng.choice([k for k in ("lr", "max_norm", "weight_decay", "momentum") if k in group])
    value: Any = rng.choice((0.0, 0.01, 0.3))
    if rng.random() < 0.3:
        value = rng.choice(BAD_NUMBERS)
    elif key == "lr" and rng.random() < 0.3:
        value = torch.tensor(float(value))

    def act(world: World) -> None:
        group = world.optimizer.param_groups[g]
        before = group[key]
        group[key] = value
        try:
            world.optimizer.step()
        except BaseException:
            group[key] = before
            raise
        if value is None or isinstance(value, str) or not 0 <= float(value) < 1:
            group[key] = before

    return act


def spoil_state(rng: random.Random, world: World) -> Action:
    """A state replaced, by an equal one or by nonsense; a step; nonsense is taken out again."""
    i, how, pick = rng.randrange(len(world.params)), rng.randrange(7), rng.random()

    def act(world: World) -> None:
        p = world.params[i]
        held = world.optimizer.state.get(p)
        if not held or p.grad is None or p.numel() == 0:
            return  # only states of what takes part are looked at in each step
        key = sorted(held)[int(pick * len(held))]
        before = held[key]
        if not isinstance(before, Tensor):
            return
        other: Any = (
            before.clone(),
            None,
            before.to(torch.int32),
            torch.zeros((*before.shape, 2), dtype=before.dtype),
            "nonsense",
            before.reshape(-1)[:1].expand(before.numel()).reshape(before.shape),
            before.to(torch.float16),
        )[how]
        held[key] = other
        try:
            world.optimizer.step()
        except BaseException:
            held[key] = before
            raise

    return act


def clear_states(rng: random.Random, world: World) -> Action:
    """All states are dropped."""
    return lambda world: world.optimizer.state.clear()


# ---- copies -------------------------------------------------------------------------------------


def copied(rng: random.Random, world: World) -> Action:
    """Goes on with a copy."""
    how = rng.randrange(2)

    def act(world: World) -> None:
        world.replace(
            copy.deepcopy(world.optimizer)
            if how == 0
            else pickle.loads(pickle.dumps(world.optimizer))
        )

    return act


def reloaded(rng: random.Random, world: World) -> Action:
    """A checkpoint, through a file, taken by the same optimizer or by a new one."""
    new = rng.random() < 0.3

    def act(world: World) -> None:
        file = io.BytesIO()
        torch.save(world.optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if new:
            sizes = [len(group["params"]) for group in world.optimizer.param_groups]
            params = iter([torch.nn.Parameter(p.detach().clone()) for p in world.params])
            groups = [{"params": [next(params) for _ in range(n)]} for n in sizes]
            kwargs = copy.deepcopy(dict(world.kwargs))
            other = world.entry.make(groups, backend=world.backend, **kwargs)
            other.load_state_dict(saved)
            world.replace(other)
        else:
            world.optimizer.load_state_dict(saved)

    return act


NONSENSE: tuple[Any, ...] = (
    None,
    -1,
    "x",
    [],
    {},
    True,
    float("nan"),
    2**70,
    torch.zeros(2, 2),
    torch.tensor(float("nan")),
    torch.ones(3, dtype=torch.int64),
)


def corrupt(rng: random.Random, world: World) -> Action:
    """A checkpoint with something in it replaced or missing."""
    place: Any = world.optimizer.state_dict()
    path: list[Any] = []  # down to some leaf or branch
    while isinstance(place, dict | list) and place and (not path or rng.random() < 0.8):
        path.append(
            rng.choice(sorted(place, key=str) if isinstance(place, dict) else range(len(place)))
        )
        place = place[path[-1]]
    value, delete = rng.choice(NONSENSE), rng.random() < 0.4

    def act(world: World) -> None:
        saved: Any = copy.deepcopy(world.optimizer.state_dict())
        place = saved
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else place[key]
        if not isinstance(place, dict | list):
            return  # an empty tensor's states, which one backend has and the other has not
        if delete and (isinstance(place, list) or path[-1] in place):
            del place[path[-1]]
        else:
            place[path[-1]] = value
        world.optimizer.load_state_dict(saved)

    return act


def cut_file(rng: random.Random, world: World) -> Action:
    """A checkpoint file that ends early, or has a byte changed in its first part."""
    where = rng.random()

    def act(world: World) -> None:
        file = io.BytesIO()
        torch.save(world.optimizer.state_dict(), file)
        data = file.getvalue()
        try:
            saved = torch.load(io.BytesIO(data[: int(where * len(data))]), weights_only=True)
        except Exception as error:  # torch's own
            raise ValueError("torch cannot read it") from error
        world.optimizer.load_state_dict(saved)

    return act


WEIGHTS = {
    step: 12,
    step_again: 2,
    step_with_scaler: 1,
    closure_raises: 0.5,
    new_data: 1.5,
    freeze: 0.5,
    new_group: 1,
    edit_group: 1,
    hyper: 2,
    spoil_state: 2,
    clear_states: 0.3,
    copied: 1,
    reloaded: 1,
    corrupt: 2,
    cut_file: 0.2,
}


def draw(rng: random.Random, world: World) -> tuple[str, Action]:
    """An action, with its name."""
    make = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return make.__name__, make(rng, world)
