"""Checkpoints: to and from torch.optim.SGD, refused ones, hooks, and the states' precision."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from battery import (
    advance,
    all_params,
    assert_same_bits,
    assert_same_snapshot,
    assert_unchanged,
    every_backend,
    make_params,
    record_grads,
    same_bits,
    snapshot,
)

from pysmooth import ClipSGD

SHAPES = ((7, 5), (), (33,), (0, 4), (2, 3))
HYPER: dict[str, Any] = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}


def clones(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- torch.optim.SGD ----------------------------------------------------------------------------


@every_backend
def test_from_torch_sgd(backend: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 8)
    twin = torch.optim.SGD(params, **HYPER)
    advance(twin, params, rows[:4])
    mine = clones(params)
    optimizer = ClipSGD(mine, lr=9.0, momentum=0.0, backend=backend)
    optimizer.load_state_dict(through_a_file(twin.state_dict()))
    for p, q in zip(mine, params, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"]
        assert same_bits(buffer, twin.state[q]["momentum_buffer"])
    assert {k: optimizer.param_groups[0][k] for k in HYPER} == HYPER
    advance(optimizer, mine, rows[4:])
    advance(twin, params, rows[4:])
    for p, q in zip(mine, params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


@every_backend
def test_to_torch_sgd(backend: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 8)
    optimizer = ClipSGD(params, max_norm=1.0, clip="none", backend=backend, **HYPER)
    advance(optimizer, params, rows[:4])
    theirs = clones(params)
    twin = torch.optim.SGD(theirs, lr=9.0)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, theirs, strict=True):
        buffer = twin.state[q]["momentum_buffer"]
        assert same_bits(buffer, optimizer.state[p]["momentum_buffer"])
    advance(optimizer, params, rows[4:])
    advance(twin, theirs, rows[4:])
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


@every_backend
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoint_of_torch_sgd_without_momentum_buffers(momentum: float, backend: str) -> None:
    """torch writes `momentum_buffer: None` where there is none; the next step is a first one."""
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    twin = torch.optim.SGD(params, lr=0.25, momentum=momentum, dampening=0.5)
    saved = twin.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    mine = clones(params)
    optimizer = ClipSGD(mine, lr=9.0, backend=backend)
    optimizer.load_state_dict(saved)
    advance(optimizer, mine, rows)
    fresh = clones(params)
    advance(ClipSGD(fresh, lr=0.25, momentum=momentum, dampening=0.5, backend=backend), fresh, rows)
    assert_same_bits(mine, fresh)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_momentum_of_16_bit_parameters_stays_float32(dtype: torch.dtype, backend: str) -> None:
    """torch's own loading would round it to the parameter's dtype."""
    params = make_params(SHAPES, dtype=dtype)
    rows = record_grads(params, 3)
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, backend=backend)
    advance(optimizer, params, rows)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    assert not same_bits(buffers[0], buffers[0].to(dtype).float())  # it has bits to lose
    mine = clones(params)
    other = ClipSGD(mine, lr=0.1, momentum=0.9, backend=backend)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits([other.state[p]["momentum_buffer"] for p in mine], buffers)

    # A checkpoint of torch's has 16 bits: they are widened, and the steps go on in float32.
    narrow = torch.optim.SGD(clones(params), lr=0.1, momentum=0.9)
    advance(narrow, all_params(narrow), rows)
    other.load_state_dict(narrow.state_dict())
    for p, q in zip(mine, all_params(narrow), strict=True):
        want = narrow.state[q]["momentum_buffer"]
        assert want.dtype == dtype
        assert same_bits(other.state[p]["momentum_buffer"], want.float())
    advance(other, mine, rows[:1])
    assert other.state[mine[0]]["momentum_buffer"].dtype == torch.float32


@every_backend
def test_a_load_takes_the_dtype_that_the_new_parameters_need(backend: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 2)
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, backend=backend)
    advance(optimizer, params, rows)
    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    other = ClipSGD(wide, lr=0.1, momentum=0.9, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, wide, strict=True):
        want = optimizer.state[p]["momentum_buffer"].double()
        assert same_bits(other.state[q]["momentum_buffer"], want)
    advance(other, wide, rows)


# ---- what is loaded and what is kept ------------------------------------------------------------


@every_backend
def test_values_that_a_checkpoint_lacks_stay_as_constructed(backend: str) -> None:
    """torch's groups have no max_norm, clip, clip_eps or decoupled_weight_decay."""
    params = make_params(SHAPES)
    own = ({"max_norm": 3.0, "clip": "smooth"}, {"clip_eps": 0.0, "decoupled_weight_decay": True})
    groups = [{"params": params[:2], **own[0]}, {"params": params[2:], **own[1]}]
    optimizer = ClipSGD(groups, lr=0.1, max_norm=7.0, momentum=0.9, backend=backend)
    twin_groups = [{"params": g["params"], "lr": 0.5} for g in groups]
    optimizer.load_state_dict(torch.optim.SGD(twin_groups, lr=0.5).state_dict())
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == (0.5, 0.5)
    assert (first["max_norm"], first["clip"], first["clip_eps"]) == (3.0, "smooth", 1e-6)
    assert (second["max_norm"], second["clip"], second["clip_eps"]) == (7.0, "hard", 0.0)
    assert (first["decoupled_weight_decay"], second["decoupled_weight_decay"]) == (False, True)


@every_backend
def test_values_changed_since_construction_are_kept_as_well(backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = ClipSGD(params, lr=0.1, max_norm=7.0, backend=backend)
    optimizer.param_groups[0]["max_norm"] = 2.0
    optimizer.load_state_dict(torch.optim.SGD(params, lr=0.5).state_dict())
    assert optimizer.param_groups[0]["max_norm"] == 2.0
    assert optimizer.param_groups[0]["lr"] == 0.5


@every_backend
def test_own_checkpoint_restores_every_value(backend: str) -> None:
    params = make_params(SHAPES)
    kwargs = {"max_norm": 3.0, "clip": "smooth", "clip_eps": 0.0, "decoupled_weight_decay": True}
    saved = ClipSGD(params, lr=0.3, maximize=True, **kwargs, backend=backend).state_dict()
    other = ClipSGD(params, backend=backend)
    other.load_state_dict(through_a_file(saved))
    for key, value in {"lr": 0.3, "maximize": True, **kwargs}.items():
        assert other.param_groups[0][key] == value


@every_backend
def test_smoothness_survives_a_checkpoint(backend: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 4)
    optimizer = ClipSGD.from_smoothness(params, 2.0, 0.5, backend=backend)
    advance(optimizer, params, rows[:2])
    mine = clones(params)
    other = ClipSGD(mine, backend=backend)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    advance(optimizer, params, rows[2:])
    advance(other, mine, rows[2:])
    assert_same_bits(params, mine)


@every_backend
def test_loading_copies(backend: str) -> None:
    """A later step of one optimizer must not move the other's momentum, or the dict's."""
    params = make_params(SHAPES)
    rows = record_grads(params, 2)
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, backend=backend)
    advance(optimizer, params, rows)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    mine = clones(params)
    other = ClipSGD(mine, lr=0.1, momentum=0.9, backend=backend)
    other.load_state_dict(saved)
    before = snapshot(optimizer)
    advance(other, mine, rows)
    assert_unchanged(optimizer, before)
    assert saved["param_groups"] == kept["param_groups"]
    for i, state in kept["state"].items():
        assert same_bits(saved["state"][i]["momentum_buffer"], state["momentum_buffer"])


@every_backend
def test_loading_its_own_state_dict_changes_nothing(backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, backend=backend)
    advance(optimizer, params, record_grads(params, 2))
    before = snapshot(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(optimizer, before)


@every_backend
def test_names_are_kept(backend: str) -> None:
    params = make_params([(2,), (3,)])
    named = [("one", params[0]), ("two", params[1])]
    optimizer = ClipSGD(named, lr=0.1, backend=backend)
    optimizer.load_state_dict(torch.optim.SGD(params, lr=0.5).state_dict())
    assert optimizer.param_labels() == ["one", "two"]


# ---- refused ------------------------------------------------------------------------------------


def spoil_shape(saved: dict[str, Any]) -> None:
    saved["state"][1]["momentum_buffer"] = torch.zeros(3)


def spoil_type(saved: dict[str, Any]) -> None:
    saved["state"][1]["momentum_buffer"] = [0.0]


def spoil_lr(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["lr"] = -1.0


def spoil_clip(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["clip"] = "soft"


def spoil_sizes(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"] = [0, 1]
    saved["param_groups"][1]["params"] = [2, 3, 4]


def spoil_count(saved: dict[str, Any]) -> None:
    del saved["param_groups"][1]


@every_backend
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_shape, r"momentum_buffer.*'b'.*shape"),
        (spoil_type, r"momentum_buffer.*'b'"),
        (spoil_lr, "lr"),
        (spoil_clip, "clip"),
        (spoil_sizes, "sizes"),
        (spoil_count, "groups"),
    ],
)
def test_bad_checkpoint_is_refused_whole(spoil: Any, match: str, backend: str) -> None:
    params = make_params(SHAPES)
    named = list(zip("abcde", params, strict=True))
    groups = [{"params": named[:3]}, {"params": named[3:]}]
    rows = record_grads(params, 4)
    optimizer = ClipSGD(groups, lr=0.1, momentum=0.9, backend=backend)
    advance(optimizer, params, rows[:2])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][0]["momentum_buffer"].fill_(7.0)
    spoil(saved)
    before = snapshot(optimizer)
    hyper = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == hyper

    # And training goes on as if nothing had been tried.
    mine = clones(params)
    other = copy.deepcopy(optimizer)
    for p, q in zip(all_params(other), mine, strict=True):
        assert same_bits(p, q)
    advance(optimizer, params, rows[2:])
    advance(other, all_params(other), rows[2:])
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


@every_backend
def test_value_clip_cannot_be_loaded_for_complex_parameters(backend: str) -> None:
    (real,) = make_params([(3,)])
    (p,) = make_params([(3,)], dtype=torch.complex64)
    saved = ClipSGD([real], clip="value", max_norm=1.0).state_dict()
    optimizer = ClipSGD([p], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="complex"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["clip"] == "hard"


# ---- hooks --------------------------------------------------------------------------------------


@every_backend
def test_load_hooks_of_the_user(backend: str) -> None:
    """A pre-hook's dict is what gets loaded; a post-hook sees the load complete."""
    params = make_params(SHAPES, dtype=torch.bfloat16)
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, max_norm=3.0, backend=backend)
    advance(optimizer, params, record_grads(params, 2))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["max_norm"]
    other = ClipSGD(clones(params), lr=9.0, max_norm=2.0, backend=backend)
    seen = {}

    def pre(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(incoming)
        changed["param_groups"][0]["lr"] = 0.75
        changed["state"][0]["momentum_buffer"] += 1.0
        return changed

    def post(loaded: torch.optim.Optimizer) -> None:
        group = loaded.param_groups[0]
        seen.update(lr=group["lr"], max_norm=group["max_norm"])
        seen["dtype"] = loaded.state[group["params"][0]]["momentum_buffer"].dtype

    other.register_load_state_dict_pre_hook(pre)
    other.register_load_state_dict_post_hook(post)
    other.load_state_dict(saved)
    assert seen == {"lr": 0.75, "max_norm": 2.0, "dtype": torch.float32}
    want = optimizer.state[params[0]]["momentum_buffer"] + 1.0
    assert same_bits(other.state[all_params(other)[0]]["momentum_buffer"], want)
    other.load_state_dict(saved)  # the hooks of the first load have not piled up
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


@every_backend
def test_state_dict_hooks_of_the_user(backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = ClipSGD(params, lr=0.1, backend=backend)
    optimizer.register_state_dict_post_hook(lambda _, d: {**d, "note": "mine"})
    saved = optimizer.state_dict()
    assert saved["note"] == "mine"
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
