"""What a hook keeps where steps are rare: no backward, no rate, a NaN, other ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_ddp_alone import TOP, alone, hooked, losses, make, sgd  # noqa: F401 - a fixture
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pysmooth.distributed import (
    EF14,
    Clip21SGD2M,
    CompressedState,
    DSignSGD,
    TwoWaySign,
    compressed_hook,
)
from pysmooth.distributed.method import Context, Slot


def test_a_step_without_a_backward_takes_nothing_in() -> None:
    ddp, opt, state, _ = hooked(EF14(TOP), sgd)
    opt.step()
    assert (state.steps, state.dropped) == (0, 0)
    losses(ddp, 0).backward()
    opt.step()
    kept = {s.name: s.states["residual"].clone() for s in state._slots}
    opt.step()
    assert (state.steps, state.dropped) == (1, 0)
    assert all(torch.equal(s.states["residual"], kept[s.name]) for s in state._slots)


def test_a_rate_of_zero_moves_neither_side() -> None:
    ddp, opt, state, model = hooked(TwoWaySign(), sgd)
    losses(ddp, 0).backward()
    opt.step()
    kept = {s.name: dict(s.states) for s in state._slots}
    bits = {k: v.clone() for held in kept.values() for k, v in held.items()}
    opt.param_groups[0]["lr"] = 0.0
    opt.zero_grad()
    losses(ddp, 1).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.step()
    for s in state._slots:
        assert all(s.states[key] is value for key, value in kept[s.name].items())
    assert all(torch.equal(kept[state._slots[-1].name][k], bits[k]) for k in bits)


def test_a_nan_reaches_everybody_and_nothing_that_is_kept() -> None:
    ddp, opt, state, model = hooked(TwoWaySign(), sgd)
    losses(ddp, 0).backward()
    opt.step()
    kept = {s.name: {k: v.clone() for k, v in s.states.items()} for s in state._slots}
    opt.zero_grad()
    (losses(ddp, 1) * float("nan")).backward()
    assert all(p.grad is not None and p.grad.isnan().all() for p in model.parameters())
    opt.step()
    assert (state.steps, state.dropped) == (1, 1)
    for s in state._slots:
        assert all(torch.equal(s.states[key], value) for key, value in kept[s.name].items())


def test_residuals_stay_behind_where_ranks_are_others() -> None:
    """Those of servers are about a share: of another length than any here."""
    ddp, opt, state, _ = hooked(TwoWaySign(), sgd)
    losses(ddp, 0).backward()
    opt.step()
    saved = state.state_dict()
    saved["world_size"], saved["steps"] = 3, 7
    for held in saved["states"].values():
        held["server_residual"] = torch.ones(2)
    state.load_state_dict(saved)
    assert state.steps == 7
    assert all(s.states == {} for s in state._slots)
    opt.zero_grad()
    losses(ddp, 1).backward()
    opt.step()
    assert state.steps == 8


def test_estimates_start_from_the_servers_among_other_ranks() -> None:
    method = Clip21SGD2M(1.0, beta=0.5, beta_hat=0.5)
    slot = Slot("w", 0, 5, torch.device("cpu"), steps=3)
    method.regroup(slot)
    assert slot.states == {}
    keys = ("grad_estimate", "server_estimate", "momentum_buffer")
    slot.states = {key: torch.randn(5) for key in keys}
    server = slot.states["server_estimate"].clone()
    method.regroup(slot)
    assert slot.states.keys() == {"grad_estimate", "server_estimate"}
    assert all(torch.equal(value, server) for value in slot.states.values())
    assert slot.states["grad_estimate"] is not slot.states["server_estimate"]


def test_a_server_without_a_share_keeps_nothing() -> None:
    method = TwoWaySign()
    slot = Slot("w", 0, 8, torch.device("cpu"), lr=0.1)
    messages = torch.zeros(3, method.size(8, 3), dtype=torch.uint8)
    reply = torch.full((method.size(8, 3),), 7, dtype=torch.uint8)
    method.serve(Context(2, 3, 0), slot, messages, reply)
    assert not slot.states
    assert not slot.touched
    assert torch.equal(reply, torch.full_like(reply, 7))


def test_a_hook_of_another_model_is_refused() -> None:
    ddp, other = DistributedDataParallel(make()), make()
    state = CompressedState(other, sgd(other.parameters()), DSignSGD(), dense_below=0)
    ddp.register_comm_hook(state, compressed_hook)
    with pytest.raises(ValueError, match="a parameter of the model was replaced after the hook"):
        losses(ddp, 0).backward()


def test_dtensors_have_hooks_of_their_own() -> None:
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)])  # type: ignore[index]
    model[0].weight = nn.Parameter(whole)  # type: ignore[index]
    with pytest.raises(TypeError, match=r"'0\.weight' is a DTensor.*compress_all_reduce"):
        CompressedState(model, sgd(model.parameters()), DSignSGD())
