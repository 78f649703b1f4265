"""Groups, schedulers, closures and hooks, for every optimizer of the registry."""

from __future__ import annotations

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    same_bits,
)
from registry import Entry
from torch import Tensor


@every_backend
@every_entry
def test_closure_is_called_with_grad_and_its_loss_returned(entry: Entry, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = entry.build([p], backend)
    start = p.detach().clone()
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    p.grad = torch.full_like(p, 1e3)  # stale: the closure has to replace it before the update
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss is calls[0]
    assert len(calls) == 1

    (q,) = make_params([(4,)])
    other = entry.build([q], backend)
    q.grad = 2 * start
    assert other.step() is None
    assert_same_bits([p], [q])


@every_backend
@every_entry
def test_each_group_has_its_own_hyper_parameters(entry: Entry, backend: str) -> None:
    """With a clip per group, groups do not see each other: apart and together are the same."""
    kwargs = {"scope": "group"} if entry.tensors else {}
    overrides = ({"lr": 0.03, "momentum": 0.5}, {"lr": 0.2, "weight_decay": 0.3, "maximize": True})
    together = make_params()
    groups = [{"params": together[:3], **overrides[0]}, {"params": together[3:], **overrides[1]}]
    optimizer = entry.build(groups, backend, **kwargs)
    rows = record_grads(together, 5)
    advance(optimizer, together, rows)

    apart = make_params()
    for part, columns, own in (
        (apart[:3], slice(0, 3), overrides[0]),
        (apart[3:], slice(3, None), overrides[1]),
    ):
        alone = entry.build([{"params": part, **own}], backend, **kwargs)
        advance(alone, part, [row[columns] for row in rows])
    assert_same_bits(together, apart)
    assert not same_bits(together[0], make_params()[0])


@every_backend
@every_entry
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_step_lr_scheduler(entry: Entry, backend: str, kind: str) -> None:
    params, by_hand = make_params(), make_params()
    rows = record_grads(params, 6)
    optimizer, manual = entry.build(params, backend), entry.build(by_hand, backend)
    if kind == "tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        manual.param_groups[0]["lr"] = 0.25
    lr = float(manual.param_groups[0]["lr"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for i, row in enumerate(rows):
        manual.param_groups[0]["lr"] = lr * 0.5 ** (i // 2)
        advance(manual, by_hand, [row])
        advance(optimizer, params, [row])
        schedule.step()
    assert_same_bits(params, by_hand)
    assert float(optimizer.param_groups[0]["lr"]) == lr / 8


@every_backend
@every_entry
def test_one_cycle_moves_lr_and_momentum(entry: Entry, backend: str) -> None:
    if "momentum" not in entry.build(make_params(), backend).defaults:
        pytest.skip("no momentum to cycle")
    params, by_hand = make_params(), make_params()
    rows = record_grads(params, 8)
    optimizer, manual = entry.build(params, backend), entry.build(by_hand, backend)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    seen = set()
    for row in rows:
        for name in ("lr", "momentum"):
            manual.param_groups[0][name] = optimizer.param_groups[0][name]
        seen.add(optimizer.param_groups[0]["momentum"])
        advance(optimizer, params, [row])
        advance(manual, by_hand, [row])
        schedule.step()
    assert_same_bits(params, by_hand)
    assert len(seen) == len(rows)  # it did cycle


@every_backend
@every_entry
def test_one_element_tensor_lr(entry: Entry, backend: str) -> None:
    first, second = make_params(), make_params()
    rows = record_grads(first, 4)
    plain, tensor = entry.build(first, backend), entry.build(second, backend)
    plain.param_groups[0]["lr"] = 0.125
    lr = torch.tensor([0.125])
    tensor.param_groups[0]["lr"] = lr
    advance(plain, first, rows[:2])
    advance(tensor, second, rows[:2])
    assert_same_bits(first, second)
    lr.fill_(0.5)  # changed in place, as schedulers do
    plain.param_groups[0]["lr"] = 0.5
    advance(plain, first, rows[2:])
    advance(tensor, second, rows[2:])
    assert_same_bits(first, second)


@every_backend
@every_entry
def test_add_param_group_in_mid_training(entry: Entry, backend: str) -> None:
    params, expected = make_params(), make_params()
    rows = record_grads(params, 6)
    kwargs = {**entry.tensors}  # so that the late group does not change the others' norm
    optimizer = entry.build(params[:2], backend, **kwargs)
    advance(optimizer, params[:2], [row[:2] for row in rows[:3]])
    optimizer.add_param_group({"params": params[2:], "lr": 0.03})
    advance(optimizer, params, rows[3:])

    advance(entry.build(expected[:2], backend, **kwargs), expected[:2], [row[:2] for row in rows])
    late = entry.build([{"params": expected[2:], "lr": 0.03}], backend, **kwargs)
    advance(late, expected[2:], [row[2:] for row in rows[3:]])
    assert_same_bits(params, expected)


@every_backend
@every_entry
def test_step_hooks_run_around_the_update(entry: Entry, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = entry.build([p], backend)
    start = p.detach().clone()
    seen: dict[str, Tensor] = {}
    pre = optimizer.register_step_pre_hook(lambda o, a, k: seen.update(pre=p.detach().clone()))
    post = optimizer.register_step_post_hook(lambda o, a, k: seen.update(post=p.detach().clone()))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert_same_bits([seen["pre"], seen["post"]], [start, p])
    assert not same_bits(start, p)
    pre.remove()
    post.remove()
    seen.clear()
    optimizer.step()
    assert not seen
