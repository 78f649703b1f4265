"""Selections by the CUDA kernels, emulated: the CPU backend's coordinates."""

from __future__ import annotations

import pytest
from cuda_kernels import (
    AGC,
    BF16,
    BLOCK,
    DTYPES,
    F32,
    F64,
    GLOBAL,
    INFO,
    NO_CLIP,
    RAND_K,
    SELECTING,
    TENSOR,
    TOP_K,
    assert_same,
    by_rows,
    hyper_of,
    make_slot,
    run_of,
    top_k,
    transposed,
)
from simt.emulated import Run, step


@pytest.mark.parametrize("rule", SELECTING)
@pytest.mark.parametrize(
    ("scope", "ratio"),
    [(TENSOR, 0.01), (GLOBAL, 0.3), (BLOCK, 0.05)],
    ids=["tensor", "global", "block"],
)
def test_top_k(rule: str, scope: int, ratio: float) -> None:
    for dtypes in [(F32, F32), (BF16, F32), (F64, F64)]:
        slots = [make_slot(rule, (n,), dtypes) for n in (1, 33, 1023, 4097, 12011)]
        slots += [make_slot(rule, (3, 7, 11), dtypes, lay=transposed)]
        run = run_of(rule, select=top_k(ratio, scope), order=2, hyper={"normalize": 1.0})
        assert_same(slots, run)


@pytest.mark.parametrize("rule", SELECTING)
def test_top_k_of_equals_takes_the_first(rule: str) -> None:
    """Few distinct magnitudes: filters mislead, lists overflow, ties are everywhere."""
    for scope, block in [(TENSOR, 1024), (GLOBAL, 1024), (BLOCK, 64)]:
        slots = [make_slot(rule, (n,)) for n in (50, 5000, 12000)]
        for slot in slots:
            assert slot.grad is not None
            slot.grad.sign_()
            slot.grad[::3] *= 2.0
            for state in slot.states:
                state.zero_()
        select = top_k(0.02, scope, block=block)
        run = run_of(rule, select=select, clip=NO_CLIP, hyper={"weight_decay": 0.0})
        assert_same(slots, run)


@pytest.mark.parametrize("scope", [TENSOR, GLOBAL, BLOCK], ids=["tensor", "global", "block"])
def test_top_k_never_takes_zeros(scope: int) -> None:
    slots = [make_slot("ef_sgd_select", (n,)) for n in (40, 9000, 30000)]
    for slot in slots:
        assert slot.grad is not None
        slot.states[0].zero_()
        slot.grad[: slot.grad.numel() - 3] = 0.0
    assert_same(slots, run_of("ef_sgd_select", select=top_k(0.5, scope)))


def test_top_k_of_values_that_a_sample_misses() -> None:
    """All large values in one place: too many, or too few, reach the filter."""
    for where in (slice(0, 2000), slice(28000, 30000)):
        slots = [make_slot("ef_sgd_select", (30000,))]
        assert slots[0].grad is not None
        slots[0].grad[where] *= 1e4
        for k in (1, 1999, 2000, 2001, 29999, 30000):
            select = (TOP_K, TENSOR, 0.0, k, 1024, False, 0)
            assert_same(slots, run_of("ef_sgd_select", select=select, clip=NO_CLIP))


def test_top_k_over_rules_and_dtypes() -> None:
    names = [name for name in INFO if INFO[name].selects]
    names = [name for name in names if INFO[name].hyper == INFO["ef21_select"].hyper]
    slots = [
        make_slot(name, (3000 + g,), DTYPES[g % len(DTYPES)], group=g)
        for g, name in enumerate(names)
    ]
    slots[2].grad = None
    run = Run(hypers=[hyper_of(name) for name in names], clips=[NO_CLIP] * len(names))
    run.select = top_k(0.05, GLOBAL)
    assert_same(slots, run)


@pytest.mark.parametrize("rule", SELECTING)
@pytest.mark.parametrize("scaled", [False, True])
def test_rand_k(rule: str, scaled: bool) -> None:
    slots = [make_slot(rule, (n,)) for n in (1, 33, 1023, 20011)]
    slots += [make_slot(rule, (3, 7, 11), (F64, F64), lay=transposed)]
    select = (RAND_K, TENSOR, 0.1, 0, 1024, scaled, 12345)
    assert_same(slots, run_of(rule, select=select), steps=2)


@pytest.mark.parametrize("rule", SELECTING)
def test_no_race_in_selections(rule: str) -> None:
    for scope, kind, order in [(TENSOR, 1, 2), (GLOBAL, 1, 1), (BLOCK, 1, 0), (TENSOR, 2, 2)]:
        slots = [make_slot(rule, (n,)) for n in (130, 5000)]
        run = run_of(rule, select=(kind, scope, 0.1, 0, 256, False, 7), races=True, order=order)
        run.resident, run.seed = 3, 5
        assert_same(slots, run)


@pytest.mark.parametrize("rule", ["ef21_plus", "ef21_plus_m"])
def test_marks_of_operands_off_their_boundaries_and_by_rows(rule: str) -> None:
    """A thread's group of elements may have its marks in two words."""
    for dtypes in [(F32, F32), (BF16, BF16), (F64, F32)]:
        off = [3 * x.itemsize for x in dtypes] + [3 * (8 if dtypes[0] == F64 else 4)] * 4
        slots = [make_slot(rule, (n,), dtypes, misplaced=off) for n in (70, 2100, 9001)]
        assert_same(slots, run_of(rule, select=top_k(0.3)), steps=2)
    rows = by_rows([make_slot(rule, shape) for shape in [(9, 67), (3, 5, 700)]])
    assert_same(rows, run_of(rule, select=top_k(0.1), clip=AGC), steps=2)


def test_rules_that_select_in_different_ways_are_no_plan() -> None:
    slots = [make_slot(name, (9,), group=g) for g, name in enumerate(("ef21_select", "ef21_plus"))]
    run = run_of("ef21_select", select=top_k(0.1))
    run.hypers, run.clips = [*run.hypers] * 2, [*run.clips] * 2
    assert "in one plan" in step(slots, run)


@pytest.mark.parametrize("storage", [1, 2, 3], ids=["master", "kahan", "stochastic"])
def test_selections_with_stored_parameters_and_residuals(storage: int) -> None:
    slots = [
        make_slot("ef_sgd_select_momentum", (n,), (BF16, F32), low=True, storage=storage)
        for n in (33, 9000)
    ]
    assert_same(slots, run_of("ef_sgd_select_momentum", select=top_k(0.05)), steps=2)


def test_nothing_is_selected_at_a_learning_rate_of_zero() -> None:
    slots = [make_slot("ef_sgd_select", (n,)) for n in (33, 9000)]
    assert_same(slots, run_of("ef_sgd_select", select=top_k(0.1), hyper={"lr": 0.0}))
