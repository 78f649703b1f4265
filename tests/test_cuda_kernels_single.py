"""A step in one cooperative launch: the bits of the launches that it replaces, and of the CPU.

All blocks are there at the same time and meet between parts. How many there are, and so who does
what, must not show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuda_kernels import (
    AGC,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    HARD,
    INFO,
    NO_CLIP,
    RULES,
    SIZES,
    assert_same,
    bits,
    by_rows,
    clone,
    doubles,
    hyper_of,
    make_slot,
    number,
    run_of,
    transposed,
    with_gaps,
)
from simt import emulated
from simt.emulated import Run, Slot, step, tensors_of

GLOBAL_SCOPE, GROUP_SCOPE, TENSOR_SCOPE = 0, 1, 2
PROPAGATE, SKIP, RAISE, ZERO = 0, 1, 2, 3
SINGLE = [name for name in RULES if INFO[name].stages == 0]


def launches_of(slots: Sequence[Slot], run: Run) -> int:
    before = emulated.calls().launches
    assert step(clone(slots), run) == ""
    return emulated.calls().launches - before


def assert_single(slots: Sequence[Slot], run: Run, steps: int = 1) -> None:
    """One launch, and the bits of the CPU; those of several launches, norms and flags included."""
    run.single = run.single or 3
    assert launches_of(slots, run) == 1
    assert_same(slots, run, steps)
    results = []
    for single in (run.single, 0):
        got = clone(slots)
        run.single = single
        assert step(got, run) == ""
        told = (run.skipped, run.nonfinite, run.nonfinite_tensors, run.kept_out)
        numbers = [run.norms, run.coefs] if run.clips[0] != NO_CLIP or run.always_norm else []
        results.append((got, told, [bits(doubles(x)) for x in numbers]))
    (ours, told, numbers), (theirs, expected, others) = results
    assert told == expected
    assert all(torch.equal(a, b) for a, b in zip(numbers, others, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert a.first == b.first
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            assert x is None or torch.equal(bits(x.detach()), bits(y.detach()))


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_every_rule_dtype_and_size(rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if not INFO[rule].reads_grad and dtypes[0] != dtypes[1]:
        pytest.skip("reads no gradient, so there is no second dtype")
    slots = [make_slot(rule, (n,), dtypes) for n in SIZES]
    assert_single(slots, run_of(rule, order=2))


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("scope", [GLOBAL_SCOPE, GROUP_SCOPE, TENSOR_SCOPE])
@pytest.mark.parametrize("clip", [HARD, NO_CLIP], ids=["clip", "no clip"])
def test_scopes_and_groups(rule: str, scope: int, clip: Any) -> None:
    """Two groups with hyper-parameters of their own, one of them on the device."""
    slots = [make_slot(rule, (n,), group=g) for n, g in ((700, 0), (33, 0), (2100, 1), (5, 1))]
    run = run_of(rule, scope=scope, clip=clip)
    other = hyper_of(rule, lr=0.02, weight_decay=0.0)
    run.hypers, run.clips = [run.hypers[0], other], [clip, clip]
    assert_single(slots, run, steps=2)


@pytest.mark.parametrize("blocks", [1, 2, 5, 64])
def test_however_many_blocks_there_are(blocks: int) -> None:
    slots = [make_slot("adam", (n,)) for n in (*SIZES, 70001)]
    assert_single(slots, run_of("adam", single=blocks, multiprocessors=1))


@pytest.mark.parametrize("rule", SINGLE)
def test_no_race_in_any_order(rule: str) -> None:
    slots = [make_slot(rule, (n,)) for n in (3, 130, 4100, 9000)]
    for order, blocks in itertools.product((0, 1, 2), (1, 3)):
        run = run_of(rule, order=order, races=True, single=blocks, multiprocessors=1)
        assert launches_of(slots, run) == 1
        assert_same(slots, run)


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("lay", [transposed, with_gaps])
def test_strided_operands(rule: str, lay: Any) -> None:
    slots = [make_slot(rule, shape, lay=lay) for shape in [(3, 5, 7), (2, 33), (4, 0, 2)]]
    assert_single(slots, run_of(rule, order=1))


@pytest.mark.parametrize("rule", [name for name in SINGLE if INFO[name].reads_grad])
@pytest.mark.parametrize("storage", [1, 2, 3], ids=["master", "kahan", "stochastic"])
def test_storage_and_states_of_16_bits(rule: str, storage: int) -> None:
    low = bool(INFO[rule].low_states)
    slots = [make_slot(rule, (n,), (BF16, F32), storage=storage, low=low) for n in (1, 33, 2049)]
    assert_single(slots, run_of(rule), steps=2)


@pytest.mark.parametrize("rule", [name for name in SINGLE if INFO[name].reads_grad])
@pytest.mark.parametrize("policy", [PROPAGATE, SKIP, RAISE, ZERO])
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
def test_gradients_that_are_not_finite(rule: str, policy: int, dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf):
        slots = [make_slot(rule, (n,), (dtype, dtype)) for n in (40, 9000, 7)]
        grad = slots[1].grad
        assert grad is not None
        grad[8888] = bad
        assert_single(slots, run_of(rule, policy=policy, always_norm=True), steps=2)


def test_a_tensor_without_gradient_sits_out() -> None:
    slots = [make_slot("sgd_momentum", (n,)) for n in (5, 700, 33)]
    slots[1].grad = None
    assert_single(slots, run_of("sgd_momentum"), steps=2)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_loss_scale_and_overflow_are_read_on_the_device(found: float) -> None:
    slots = [make_slot("adam", (n,)) for n in (33, 700)]
    run = run_of("adam", grad_scale=number(1024.0, F32), found_inf=number(found, F32), single=2)
    before = clone(slots)
    assert launches_of(slots, run) == 1
    several = clone(slots)
    assert step(slots, run) == ""
    run.single = 0
    assert step(several, run) == ""
    for a, b, c in zip(slots, several, before, strict=True):
        for x, y, z in zip(tensors_of(a), tensors_of(b), tensors_of(c), strict=True):
            assert x is None or torch.equal(bits(x.detach()), bits(y.detach()))
            assert x is None or found == 0.0 or torch.equal(bits(x.detach()), bits(z.detach()))


def test_what_was_clipped_by_nothing_is_left_alone() -> None:
    """clip_grad_norm_: a coefficient of 1 writes nothing."""
    for max_norm in (1.0, 1e9):
        slots = [make_slot("scale", (n,)) for n in (33, 700)]
        clip = (1, max_norm, 1e-6, 0.0, 0.0, -1.0, False)
        settings: dict[str, Any] = {"always_norm": True, "skip_unit_coef": True}
        assert_single(slots, run_of("scale", hyper={"coef": 1.0}, clip=clip, **settings))


def test_numbers_that_do_not_fit_go_ahead() -> None:
    """More addresses than the launch takes along."""
    slots = [make_slot("sgd_momentum", (2,)) for _ in range(400)]
    run = run_of("sgd_momentum", single=2)
    assert launches_of(slots, run) == 2
    assert_same(slots, run)


def test_what_has_more_to_do_takes_several_launches() -> None:
    """Passes, selections, rows, other norms, two rules or dtypes, gradients taken in before."""
    plain = [make_slot("sgd_momentum", (33,))]
    cases: list[tuple[Sequence[Slot], Run, int]] = [
        ([make_slot("ef_sgd_dense", (33,))], run_of("ef_sgd_dense"), 6),
        (by_rows([make_slot("sgd_momentum", (7, 5))]), run_of("sgd_momentum", clip=AGC), 6),
        (plain, run_of("sgd_momentum", norm_type=1.0), 4),
        ([*plain, make_slot("sgd_momentum", (5,), (F64, F64))], run_of("sgd_momentum"), 5),
        ([make_slot("sgd_momentum", (0,))], run_of("sgd_momentum"), 3),
    ]
    for slots, run, launches in cases:
        run.single = 2
        assert launches_of(slots, run) == launches
        assert_same(slots, run)
