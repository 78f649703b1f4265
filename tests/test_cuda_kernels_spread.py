"""Parts of tensors in several processes: all end where one process with whole tensors does.

Each process has a plan and memory of its own; while one works the others' memory cannot be touched,
and between launches what they tell each other is added up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_kernels import (
    F32,
    F64,
    HARD,
    INFO,
    NO_CLIP,
    RULES,
    TENSOR,
    clone,
    make_slot,
    on_cpu,
    run_of,
    tensors_of,
    top_k,
)
from simt.emulated import Run, Slot, step
from torch import Tensor

GLOBAL_SCOPE, GROUP_SCOPE, TENSOR_SCOPE = 0, 1, 2
SKIP, ZERO = 1, 3
ELSEWHERE = -2  # in place of a tensor
# On three processes: even, uneven, with empty parts, a scalar, more than a run.
SHAPES: list[tuple[int, ...]] = [(9, 5), (34,), (2, 3), (1,), (8193, 3), (2100,)]
# Noise counts elements of the part, so that parts have other than the whole.
WHOLE = [rule for rule in RULES if INFO[rule].reads_grad and not rule.endswith("_noise")]
SUMMING = [rule for rule in WHOLE if INFO[rule].stages or INFO[rule].accumulates]
EXACT = [rule for rule in WHOLE if rule not in SUMMING]


def slots_of(rule: str, shapes: Sequence[Sequence[int]] = SHAPES, **kwargs: Any) -> list[Slot]:
    """With gradients whose sums are the same in any order: few bits."""
    torch.manual_seed(7)
    slots = [make_slot(rule, shape, **kwargs) for shape in shapes]
    for slot in slots:
        assert slot.grad is not None
        slot.grad = torch.randint(-3, 4, slot.grad.shape).to(slot.grad.dtype) / 4
    return slots


def cut(x: Tensor, processes: int) -> list[Tensor]:
    """As a DTensor with Shard(0) is cut up."""
    pieces = list(x.chunk(processes)) if x.shape[0] > 0 else []
    none = x.new_empty((0, *x.shape[1:]))
    return [piece.clone() for piece in pieces + [none] * (processes - len(pieces))]


def parts_of(
    slots: Sequence[Slot], processes: int, *, stages: int = 1, jointly: bool = False
) -> tuple[list[Slot], list[list[Slot]]]:
    """All processes' slots, one process after the other, and those of each tensor."""
    each, of = processes // stages, []
    for t, slot in enumerate(slots):
        assert slot.param is not None
        params = cut(slot.param, each)
        grads = [None] * each if slot.grad is None else cut(slot.grad, each)
        states = [cut(x, each) for x in slot.states]
        begin, own = 0, []
        for rank, param in enumerate(params):
            part = copy.deepcopy(slot)  # with numbers of its own
            part.param, part.grad = param, grads[rank]
            part.states = [pieces[rank] for pieces in states]
            part.site = t % stages * each + rank
            counted = param.numel() == 0 and slot.grad is not None
            part.part = (slot.param.numel(), begin if jointly else -1, counted)
            begin += param.numel()
            own.append(part)
        of.append(own)
    listed = [slot for own in of for slot in own]
    return sorted(listed, key=lambda slot: slot.site), of


def assert_as_whole(
    slots: list[Slot],
    run: Run,
    processes: int = 3,
    *,
    stages: int = 1,
    steps: int = 2,
    exact: bool = False,
    jointly: bool = False,
) -> None:
    """Steps of the CPU backend on whole tensors, and of the kernels on parts."""
    run.processes, run.stages = processes, stages
    expected = clone(slots)
    listed, of = parts_of(slots, processes, stages=stages, jointly=jointly)
    near = 0.0 if exact else 2e-6
    for _ in range(steps):
        before = on_cpu(expected, run)
        assert step(listed, run) == ""
        assert run.torn == 0
        assert run.skipped == before.skipped
        if before.norms and run.scope != TENSOR_SCOPE:
            torch.testing.assert_close(run.norms, before.norms, rtol=1e-12, atol=0, equal_nan=True)
        coefs = dict(zip(map(id, listed), run.coefs, strict=True))
        for t, own in enumerate(of):
            for part in own:
                assert part.param is not None
                if before.coefs and part.param.numel() > 0:
                    pair = coefs[id(part)], before.coefs[t]
                    torch.testing.assert_close(*pair, rtol=1e-12, atol=0, equal_nan=True)
    for whole, own in zip(expected, of, strict=True):
        cuts = [tensors_of(part) for part in own]
        for k, x in enumerate(tensors_of(whole)):
            pieces = [c[k] for c in cuts]
            if x is None or x.dim() == 0:  # numbers, which all have
                for piece in pieces:
                    torch.testing.assert_close(piece, x, rtol=near, atol=0)
                continue
            got = torch.cat(pieces)
            scale = 1.0 if exact else max(1e-30, float(x.abs().max()) if x.numel() else 0.0)
            torch.testing.assert_close(got, x, rtol=0, atol=near * scale, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0])
@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, GROUP_SCOPE, TENSOR_SCOPE])
def test_every_norm(norm_type: float, scope: int) -> None:
    slots = slots_of("sgd_momentum")
    for slot in slots[4:]:
        slot.group = 1
    run = run_of("sgd_momentum", norm_type=norm_type, scope=scope)
    run.hypers, run.clips = [run.hypers[0]] * 2, [HARD] * 2
    assert_as_whole(slots, run, exact=norm_type != 3.0)


@pytest.mark.parametrize("rule", EXACT)
def test_rules_without_sums_of_their_own(rule: str) -> None:
    run = run_of(rule)
    run.clips = [HARD]
    assert_as_whole(slots_of(rule), run, exact=True)


@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, TENSOR_SCOPE])
@pytest.mark.parametrize("rule", SUMMING)
def test_rules_with_sums_of_their_own(rule: str, scope: int) -> None:
    """Sums of passes are of whole tensors, over all of them or of one."""
    other = GLOBAL_SCOPE + TENSOR_SCOPE - scope
    run = run_of(rule, scope=scope, stage_scopes=(scope, other, scope, other, scope))
    assert_as_whole(slots_of(rule), run)


@pytest.mark.parametrize("order", range(3))
def test_in_any_order_of_threads_and_without_races(order: int) -> None:
    run = run_of("ef21_dense", order=order, seed=5, resident=2, races=True)
    run.stage_scopes = (GLOBAL_SCOPE,) * 5
    assert_as_whole(slots_of("ef21_dense", SHAPES[:4]), run, steps=1)
    run = run_of("ef_sgd_select", order=order, seed=5, races=True, select=top_k(0.0, TENSOR, k=4))
    assert_as_whole(slots_of("ef_sgd_select", SHAPES[:4]), run, steps=1, jointly=True)
    run = run_of("norm_accumulator", order=order, seed=5, races=True)
    assert_as_whole(slots_of("norm_accumulator", SHAPES[:4]), run, 4, stages=2, steps=1)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, -math.inf, 3.0])
@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, GROUP_SCOPE, TENSOR_SCOPE])
def test_stages_of_a_pipeline(stages: int, norm_type: float, scope: int) -> None:
    """Units are those of all stages; tensors are in one stage each, of every group as many."""
    slots = slots_of("sgd_momentum", SHAPES[:4] * 2)
    for slot in slots[4:]:
        slot.group = 1
    run = run_of("sgd_momentum", norm_type=norm_type, scope=scope)
    run.hypers, run.clips = [run.hypers[0]] * 2, [HARD] * 2
    assert_as_whole(slots, run, 4, stages=stages)


@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, TENSOR_SCOPE])
@pytest.mark.parametrize("rule", SUMMING)
def test_sums_of_rules_over_stages(rule: str, scope: int) -> None:
    run = run_of(rule, scope=scope, stage_scopes=(scope,) * 5)
    assert_as_whole(slots_of(rule), run, 4, stages=2)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_stage_without_gradients(stages: int) -> None:
    """Its norm is that of the others; what is accumulated follows."""
    for rule in ("sgd_momentum", "norm_accumulator"):
        slots = slots_of(rule, SHAPES[:4])
        for slot in slots[::2]:
            slot.grad = None
        assert_as_whole(slots, run_of(rule), 4, stages=stages)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, -math.inf])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("policy", [0, SKIP, ZERO])
def test_what_is_not_finite_in_one_process(policy: int, stages: int, norm_type: float) -> None:
    """All learn of it, though a maximum would lose a NaN."""
    slots = slots_of("sgd_momentum", SHAPES[:4])
    assert slots[1].grad is not None
    slots[1].grad[33] = math.nan
    run = run_of("sgd_momentum", norm_type=norm_type, policy=policy)
    run.clips = [HARD if policy else NO_CLIP]
    run.always_norm = False
    assert_as_whole(slots, run, 4, stages=stages)
    if policy:
        assert run.nonfinite
        assert run.skipped == (policy == SKIP)


@pytest.mark.parametrize("rule", ["sgd_momentum", "ef_sgd_dense"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_gradient_that_one_process_lacks(rule: str, stages: int) -> None:
    """Nothing happens where the norm tells; a pass tells before parameters change."""
    run = run_of(rule, stage_scopes=(GLOBAL_SCOPE,) * 5)
    run.clips = [HARD if INFO[rule].stages == 0 else NO_CLIP]
    run.processes, run.stages = 4, stages
    listed, of = parts_of(slots_of(rule), 4, stages=stages)
    of[1][-1].grad = None
    before = [part.param.clone() for part in listed if part.param is not None]
    assert step(listed, run) == ""
    assert run.skipped
    assert run.kept_out == 0  # that is what a policy does
    # Of the first process: the tensor; in another stage it has no name.
    assert run.torn == (2 if stages == 1 else ELSEWHERE)
    for old, part in zip(before, (p for p in listed if p.param is not None), strict=True):
        assert part.param is not None
        assert torch.equal(old, part.param)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_largest_of_all_parts(dtype: torch.dtype, tied: bool, processes: int) -> None:
    """Of equals those with the lowest index in the whole."""
    for rule in ("ef_sgd_select", "ef21_select"):
        slots = slots_of(rule, dtypes=(dtype, dtype))
        for slot in slots:
            slot.states = [
                torch.zeros_like(x) if tied else torch.randn_like(x) for x in slot.states
            ]
        run = run_of(rule, select=top_k(0.0, TENSOR, k=7))
        assert_as_whole(slots, run, processes, jointly=True, exact=INFO[rule].stages == 1)


def test_the_largest_of_each_part() -> None:
    """Without that, every part is a tensor of its own."""
    slots = slots_of("ef_sgd_select", SHAPES[:3])
    run = run_of("ef_sgd_select", select=top_k(0.0, TENSOR, k=2), clip=NO_CLIP)
    run.processes = 3
    listed, _ = parts_of(slots, 3)
    alone = clone(listed)
    assert step(listed, run) == ""
    run.processes = 0
    for rank in range(3):
        own = [replace(slot, site=0) for slot in alone if slot.site == rank]
        on_cpu(own, replace(run))
        for x, y in zip(own, (s for s in listed if s.site == rank), strict=True):
            for a, b in zip(tensors_of(x), tensors_of(y), strict=True):
                if y.part[2] and b is y.steps:  # an empty part, which counts them
                    assert int(b) == 4
                else:
                    assert a is None or torch.equal(a, b)


def test_plans_refuse_parts_on_several_devices() -> None:
    slots = slots_of("sgd_momentum", SHAPES[:2])
    run = run_of("sgd_momentum", sites=2)
    run.processes = 1
    listed, _ = parts_of(slots, 1)
    assert "one device" in step(listed, run)
