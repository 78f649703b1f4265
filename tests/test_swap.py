"""From torch's optimizers to their fused twins in mid-training, and back."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from battery import (
    advance,
    all_params,
    assert_same_bits,
    assert_same_snapshot,
    every_backend,
    make_params,
    max_ulp,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
)
from torch.nn import Parameter
from torch.optim import lr_scheduler

import pysmooth
from pysmooth.optim._names import TAKES_NAMES

SHAPES = ((7, 5), (33,), (), (2, 3), (0, 4))
Make = Callable[[list[Any]], torch.optim.Optimizer]

MAKES: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "sgd-dampening": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, dampening=0.5, maximize=True, foreach=True
    ),
    "adagrad": lambda p: torch.optim.Adagrad(
        p, lr=0.1, lr_decay=0.01, weight_decay=0.01, initial_accumulator_value=0.1
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, betas=(0.8, 0.99)),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, eps=1e-6),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:  # not in torch 2.6
    MAKES["adam-decoupled"] = lambda p: torch.optim.Adam(
        p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True
    )
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def named(pairs: Iterable[tuple[str, Parameter]]) -> dict[str, Any]:
    """A group; before torch 2.6, with names as what else a group may hold."""
    pairs = list(pairs)
    if TAKES_NAMES:
        return {"params": pairs}
    return {"params": [p for _, p in pairs], "param_names": [name for name, _ in pairs]}


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    """Two groups of different options, with names."""
    return [
        named((f"a{i}", p) for i, p in enumerate(params[:2])),
        {
            **named((f"b{i}", p) for i, p in enumerate(params[2:])),
            "lr": 0.05,
            "weight_decay": 0.3,
            "note": "kept",
        },
    ]


def start(dtype: torch.dtype = torch.float64) -> tuple[list[Parameter], list[Parameter], Any]:
    params = make_params(SHAPES, dtype)
    return params, copy.deepcopy(params), record_grads(params, 9)


def assert_close(params: list[Parameter], theirs: list[Parameter]) -> None:
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@every_backend
@every_make
def test_there_and_back_follows_torch(make: Make, backend: str) -> None:
    params, theirs, rows = start()
    mine, reference = make(groups(params)), make(groups(theirs))
    advance(reference, theirs, rows[:3])
    advance(mine, params, rows[:3])
    before = snapshot(mine)
    twin = pysmooth.swap(mine, backend=backend)
    assert_same_bits(snapshot(twin)[0], before[0])
    for state, old in zip(snapshot(twin)[1], before[1], strict=True):
        for key, value in state.items():
            assert same_bits(value, old[key].to(value.dtype)), key
    advance(twin, params, rows[3:6])
    advance(reference, theirs, rows[3:6])
    assert_close(params, theirs)
    assert twin.param_groups[1]["note"] == "kept"
    assert twin.param_labels()[0] == "a0"
    back = pysmooth.unswap(twin)
    assert type(back) is type(reference)
    assert back.defaults == reference.defaults
    for group, old in zip(back.param_groups, reference.param_groups, strict=True):
        assert group.keys() == old.keys()
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in old.items() if k != "params"
        }
    advance(back, params, rows[6:])
    advance(reference, theirs, rows[6:])
    assert_close(params, theirs)
    assert back.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


@every_make
def test_one_float32_step_is_within_three_units(make: Make) -> None:
    """On the same gradients, from the same states: the bound that swap() states."""
    params, theirs, rows = start(torch.float32)
    mine, reference = make(list(params)), make(list(theirs))
    advance(mine, params, rows[:4])
    advance(reference, theirs, rows[:4])
    assert_same_bits(params, theirs)
    before = [p.detach().clone() for p in params]
    twin = pysmooth.swap(mine)
    advance(twin, params, rows[4:5])
    advance(reference, theirs, rows[4:5])
    for p, q, b in zip(params, theirs, before, strict=True):
        size = torch.maximum(b.abs(), (q.detach() - b).abs())
        assert max_ulp(p, q.detach().double(), size) <= 3


@pytest.mark.parametrize("make", [MAKES["sgd-nesterov"], MAKES["adamw"]])
def test_the_clip_moves_into_the_step(make: Make) -> None:
    params, theirs, rows = start()
    mine, reference = make(list(params)), make(list(theirs))

    def clipped(optimizer: torch.optim.Optimizer, of: list[Parameter], row: Any) -> None:
        set_grads(of, row)
        torch.nn.utils.clip_grad_norm_(of, 0.5)
        optimizer.step()

    for row in rows[:3]:
        clipped(mine, params, row)
    twin = pysmooth.swap(mine, max_norm=0.5)
    advance(twin, params, rows[3:6])
    for row in rows[:6]:
        clipped(reference, theirs, row)
    assert_close(params, theirs)
    with pytest.raises(ValueError, match=r"no counterpart of clip.*group 0.*drop=\['clip'\]"):
        pysmooth.unswap(twin)
    back = pysmooth.unswap(twin, drop=["clip"])
    for row in rows[6:]:
        clipped(back, params, row)
        clipped(reference, theirs, row)
    assert_close(params, theirs)


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
            lr_scheduler.CosineAnnealingLR(optimizer, 6),
        ],
        milestones=[2],
    )


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "sequential": sequential,
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=9, cycle_momentum=True),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedulers_follow(schedule: Any, at: int, explicit: bool) -> None:
    params, theirs, rows = start()
    make = MAKES["sgd-nesterov"]
    mine: torch.optim.Optimizer
    mine, reference = make(groups(params)), make(groups(theirs))
    if schedule is SCHEDULES["one-cycle"]:
        reference.param_groups[1]["lr"] = mine.param_groups[1]["lr"] = 0.1
    held, follows = schedule(mine), schedule(reference)
    inner = list(getattr(held, "_schedulers", ()))
    for i, row in enumerate(rows):
        if i == at:
            mine = pysmooth.swap(mine, schedulers=[held, *inner] if explicit else None)
        elif i == 6:
            mine = pysmooth.unswap(mine, schedulers=[held, *inner] if explicit else None)
        assert all(s.optimizer is mine for s in (held, *inner))
        for optimizer, of, s in ((mine, params, held), (reference, theirs, follows)):
            advance(optimizer, of, [row])
            s.step(1.0) if schedule is SCHEDULES["plateau"] else s.step()
        assert [g["lr"] for g in mine.param_groups] == [g["lr"] for g in reference.param_groups]
    assert_close(params, theirs)


def test_a_scheduler_that_goes_first_is_told() -> None:
    """Torch's warning for a scheduler that steps before its optimizer, and no other time."""
    params, _, rows = start()
    for stepped in (False, True):
        mine = MAKES["adam"](params)
        held = lr_scheduler.StepLR(mine, 1)
        if stepped:
            advance(mine, params, rows[:1])
        twin = pysmooth.swap(mine)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            held.step()
        assert [str(w.message)[:41] for w in said] == (
            [] if stepped else ["Detected call of `lr_scheduler.step()` be"]
        )
        assert held.optimizer is twin


def test_a_group_added_later_has_torchs_switches_too() -> None:
    params, _, _ = start()
    twin = pysmooth.swap(torch.optim.Adam(params[:1], foreach=False))
    twin.add_param_group({"params": params[1:]})
    back = pysmooth.unswap(twin)
    assert [group["foreach"] for group in back.param_groups] == [False, False]


def test_another_optimizers_scheduler_stays_and_is_refused() -> None:
    params, theirs, _ = start()
    mine, other = MAKES["adam"](list(params)), MAKES["adam"](list(theirs))
    of_mine, of_other = lr_scheduler.StepLR(mine, 1), lr_scheduler.StepLR(other, 1)
    with pytest.raises(ValueError, match=r"schedulers\[1\] does not have this optimizer"):
        pysmooth.swap(mine, schedulers=[of_mine, of_other])
    assert of_mine.optimizer is mine
    pysmooth.swap(mine)
    assert of_other.optimizer is other


def test_hooks_and_lr_tensors_go_along() -> None:
    params, _, rows = start()
    rate = torch.tensor(0.1)
    mine = torch.optim.Adam(params, lr=rate)
    calls: list[Any] = []
    handle = mine.register_step_pre_hook(lambda o, a, k: calls.append(o))
    mine.register_load_state_dict_pre_hook(lambda o, s: pytest.fail("nothing was loaded"))
    mine.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
    advance(mine, params, rows[:1])
    twin = pysmooth.swap(mine)
    assert twin.param_groups[0]["lr"] is rate
    advance(twin, params, rows[1:2])
    handle.remove()
    advance(twin, params, rows[2:3])
    twin.state_dict()
    assert calls == [mine, twin, "saved"]


def test_parameters_without_a_state_start_afresh() -> None:
    """Whose first gradient comes after the swap, either way."""
    for make in (MAKES["adagrad"], MAKES["adam"], MAKES["sgd-nesterov"]):
        params, theirs, rows = start()
        mine: torch.optim.Optimizer
        mine, reference = make(list(params)), make(list(theirs))
        for i, row in enumerate(rows):
            given = [g if i > 3 * k else None for k, g in enumerate(row[:3])] + [None, None]
            advance(mine, params, [given])
            advance(reference, theirs, [given])
            if i in (1, 5):
                mine = pysmooth.swap(mine)
            elif i == 3:
                mine = pysmooth.unswap(mine)
        assert_close(params, theirs)


def test_a_state_dict_goes_on_where_the_swap_was() -> None:
    params, theirs, rows = start(torch.float32)
    mine = MAKES["adamw"](groups(params))
    advance(mine, params, rows[:3])
    twin = pysmooth.swap(mine, max_norm=1.0, state_dtype=torch.bfloat16)
    advance(twin, params, rows[3:5])
    with torch.no_grad():
        for p, q in zip(params, theirs, strict=True):
            q.copy_(p)
    other = pysmooth.AdamW(groups(theirs))
    other.load_state_dict(twin.state_dict())
    assert_same_snapshot(snapshot(twin), snapshot(other))
    advance(twin, params, rows[5:])
    advance(other, theirs, rows[5:])
    assert_same_snapshot(snapshot(twin), snapshot(other))


class Odd(torch.optim.SGD):
    pass


def test_what_has_no_twin() -> None:
    params, _, _ = start()
    for make, match in (
        (Odd, "Odd has no fused twin"),
        (torch.optim.RMSprop, "RMSprop has no fused twin"),
    ):
        with pytest.raises(TypeError, match=match):
            pysmooth.swap(make(params))
    with pytest.raises(TypeError, match="takes lr from the optimizer's groups"):
        pysmooth.swap(torch.optim.SGD(params), lr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_nrm'"):
        pysmooth.swap(torch.optim.SGD(params), max_nrm=0.1)
    with pytest.raises(ValueError, match="group 0 has differentiable=True"):
        pysmooth.swap(torch.optim.Adam(params, differentiable=True))
    with pytest.raises(TypeError, match="SignSGD has no twin in torch"):
        pysmooth.unswap(pysmooth.SignSGD(params, 0.1))
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = torch.optim.SGD([named(embedding.named_parameters())])
    with pytest.raises(ValueError, match="gradient of parameter 'weight' is sparse"):
        pysmooth.swap(optimizer)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"nonfinite": "skip"}, "nonfinite"),
        ({"clip": "agc"}, "clip"),
        ({"clip": "value", "max_norm": 1.0}, "clip"),
        ({"kahan": True}, "kahan"),
        ({"master_weights": True}, "master_weights"),
        ({"state_dtype": torch.bfloat16}, "state_dtype"),
    ],
)
def test_what_torch_does_not_have_is_named(options: dict[str, Any], name: str) -> None:
    params, _, rows = start(torch.bfloat16)
    twin = pysmooth.swap(torch.optim.AdamW(params), **options)
    advance(twin, params, rows[:2])
    scheduler = lr_scheduler.StepLR(twin, 1)
    before = snapshot(twin)
    with pytest.raises(ValueError, match=f"no counterpart of {name}"):
        pysmooth.unswap(twin)
    assert scheduler.optimizer is twin
    assert_same_snapshot(snapshot(twin), before)
    back = pysmooth.unswap(twin, drop=[name])
    advance(back, params, rows[2:4])
    assert scheduler.optimizer is back


def test_a_refused_option_leaves_all_as_it_was() -> None:
    params, _, rows = start()
    mine = torch.optim.Adam(params)
    scheduler = lr_scheduler.StepLR(mine, 1)
    advance(mine, params, rows[:1])
    before = snapshot(mine)
    with pytest.raises(ValueError, match="max_norm must be greater than 0"):
        pysmooth.swap(mine, max_norm=-1.0)
    assert scheduler.optimizer is mine
    assert_same_snapshot(snapshot(mine), before)
    assert all_params(mine) == params


def test_sgd_with_decoupled_decay_stays() -> None:
    params, _, _ = start()
    twin = pysmooth.ClipSGD(params, 0.1, weight_decay=0.1, decoupled_weight_decay=True)
    with pytest.raises(ValueError, match="no counterpart of decoupled_weight_decay"):
        pysmooth.unswap(twin)
