"""Tensors on several devices: every device ends in the bits of a step on one.

Each has a plan and memory of its own; while one works, the others' memory cannot be touched, but
for what is copied between launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuda_kernels import (
    AGC,
    F16,
    F32,
    F64,
    GLOBAL,
    HARD,
    INFO,
    NO_CLIP,
    RAND_K,
    RULES,
    SELECTING,
    STAGED,
    TENSOR,
    assert_same,
    by_rows,
    clone,
    hyper_of,
    make_slot,
    number,
    run_of,
    tensors_of,
    top_k,
    transposed,
)
from simt.emulated import Run, Slot, step
from test_cuda_kernels_blocks import SCALING, blocks_of

GLOBAL_SCOPE, GROUP_SCOPE, TENSOR_SCOPE = 0, 1, 2
SKIP, RAISE, ZERO = 1, 2, 3
SHAPES = [(7, 5), (33,), (8193,), (0, 3), (3, 4, 5), (1,), (32769,), (2100,)]
PLACES = (0, 1, 2, 1, 0, 2, 1, 0)


def spread(slots: Sequence[Slot], places: Sequence[int] = PLACES) -> list[Slot]:
    for slot, place in zip(slots, places, strict=False):
        slot.site = place
    return list(slots)


def slots_of(rule: str, shapes: Any = SHAPES, **kwargs: Any) -> list[Slot]:
    torch.manual_seed(7)
    return spread([make_slot(rule, shape, **kwargs) for shape in shapes])


@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, TENSOR_SCOPE])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str, scope: int) -> None:
    """Sums of passes are of all devices, and of single tensors, in turn."""
    other = GLOBAL_SCOPE + TENSOR_SCOPE - scope
    run = run_of(rule, scope=scope, stage_scopes=(scope, other, scope, other, scope), sites=3)
    assert_same(slots_of(rule, SHAPES[: 4 + scope]), run, steps=2)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 0.0])
def test_every_norm(norm_type: float) -> None:
    shapes = [s for s in SHAPES if 0 not in s] if norm_type < 0 else SHAPES
    run = run_of("sgd_momentum", norm_type=norm_type, sites=3)
    assert_same(slots_of("sgd_momentum", shapes), run)


@pytest.mark.parametrize("order", range(3))
def test_in_any_order_of_threads_and_without_races(order: int) -> None:
    run = run_of("ef21_dense", order=order, seed=5, resident=2, races=True, sites=3)
    run.stage_scopes = (GLOBAL_SCOPE,) * 5
    assert_same(slots_of("ef21_dense"), run)


def test_more_tensors_than_threads_of_a_block() -> None:
    slots = [make_slot("adam", (3,)) for _ in range(300)]
    assert_same(spread(slots, [t % 2 for t in range(300)]), run_of("adam", sites=2))


@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, GROUP_SCOPE])
def test_groups_over_devices(scope: int) -> None:
    """Norms, sums of passes and what rules accumulate are of a group's tensors on all devices."""
    for rule in (*STAGED, *(name for name in RULES if INFO[name].accumulates)):
        if rule in SELECTING:
            continue
        slots = slots_of(rule)
        for t, slot in enumerate(slots):
            slot.group = t // 3
        hyper = [hyper_of(rule, lr=0.1 * (g + 1)) for g in range(3)]
        run = Run(hypers=hyper, clips=[HARD, NO_CLIP, HARD], scope=scope, sites=3)
        run.stage_scopes = (GROUP_SCOPE,) * 5
        assert_same(slots, run, steps=2)


@pytest.mark.parametrize("rule", [name for name in RULES if INFO[name].accumulates])
def test_one_that_joins_takes_a_number_from_another_device(rule: str) -> None:
    slots = slots_of(rule)
    for t, slot in enumerate(slots):
        slot.first = t not in (2, 6)
        slot.norm_sq = number(0.7 if t in (2, 6) else 0.0, F64)
    assert_same(slots, run_of(rule, sites=3), steps=2)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (F16, F32)], ids=str)
def test_clipped_by_rows(dtypes: Any) -> None:
    for rule in ("sgd_momentum", "norm_accumulator_momentum"):
        slots = by_rows(slots_of(rule, dtypes=dtypes))
        assert_same(slots, run_of(rule, clip=AGC, sites=3))


def test_strided_and_without_a_gradient() -> None:
    slots = slots_of("adam", [(7, 5), (3, 4, 5), (9, 2), (6, 33)], lay=transposed)
    slots[1].grad = None
    assert_same(slots, run_of("adam", sites=3))
    for slot in slots[::3]:
        slot.grad = None
    assert_same(slots, run_of("adam", sites=3))  # nothing at all on one of them


@pytest.mark.parametrize("policy", [SKIP, RAISE, ZERO])
@pytest.mark.parametrize("bad", [0, 2, 6])
def test_all_devices_take_a_step_or_none_does(policy: int, bad: int) -> None:
    slots = slots_of("adam")
    grad = slots[bad].grad
    assert grad is not None
    grad.view(-1)[0] = math.nan
    run = run_of("adam", policy=policy, sites=3)
    assert_same(slots, run)
    assert run.skipped == (policy != ZERO)
    assert run.nonfinite_tensors == [t == bad for t in range(len(slots))]
    before = clone(slots)
    assert step(slots, run) == ""
    for a, b in zip(before, slots, strict=True):
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            assert x is None or policy == ZERO or torch.equal(x, y)


def test_a_skipped_step_with_passes() -> None:
    slots = slots_of("ef21_dense")
    grad = slots[2].grad
    assert grad is not None
    grad[5] = math.inf
    run = run_of("ef21_dense", policy=SKIP, sites=3)
    run.stage_scopes = (GLOBAL_SCOPE,) * 5
    assert_same(slots, run)
    assert run.skipped


def test_loss_scale_and_overflow() -> None:
    for overflow in (0.0, 1.0):
        slots, twins = slots_of("adam"), slots_of("adam")
        run = run_of("adam", sites=3, grad_scale=number(8.0, F32))
        run.found_inf = number(overflow, F32)
        assert step(slots, run) == ""
        alone = run_of("adam", grad_scale=number(8.0, F32), found_inf=number(overflow, F32))
        for slot in twins:
            slot.site = 0
        assert step(twins, alone) == ""
        assert run.skipped == alone.skipped == bool(overflow)
        for a, b in zip(slots, twins, strict=True):
            for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
                assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("rule", SELECTING)
def test_selections_within_tensors(rule: str) -> None:
    for select in (top_k(0.1), (RAND_K, TENSOR, 0.1, 0, 1024, True, 3)):
        run = run_of(rule, select=select, hyper={"normalize": 1.0}, sites=3)
        assert_same(slots_of(rule, SHAPES[:4]), run)


@pytest.mark.parametrize("rule", SCALING)
def test_a_scale_for_every_block(rule: str) -> None:
    assert_same(slots_of(rule, SHAPES[:6]), blocks_of(rule, 64, sites=3))


def test_what_needs_the_values_of_all_tensors_is_refused() -> None:
    rule = SELECTING[0]
    run = run_of(rule, select=top_k(0.1, GLOBAL), sites=2)
    slots = spread([make_slot(rule, (5,)), make_slot(rule, (6,))], (0, 1))
    assert "largest of tensors on several devices" in step(slots, run)
    absorbing = next(name for name in RULES if INFO[name].absorbs)
    run = run_of(absorbing, absorbs=1, sites=2)
    slots = spread([make_slot(absorbing, (5,)), make_slot(absorbing, (6,))], (0, 1))
    assert "are not absorbed" in step(slots, run)
