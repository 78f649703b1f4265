"""Norms by the CUDA kernels, emulated: of whole gradients, and of their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
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
    RULES,
    SIZES,
    assert_same,
    bits,
    by_rows,
    clone,
    doubles,
    hyper_of,
    make_slot,
    on_cpu,
    run_of,
    transposed,
    with_gaps,
)
from simt.emulated import Run, Slot, step
from torch import Tensor

# ---- reduce --------------------------------------------------------------------------------------


def norms_of(grads: Sequence[Tensor], norm_type: float, **settings: Any) -> tuple[Run, Run]:
    slots = [Slot("sgd", torch.zeros_like(g), g) for g in grads]
    run = run_of("sgd", norm_type=norm_type, always_norm=True, **settings)
    expected = on_cpu(clone(slots), run)
    assert step(slots, run) == ""
    return run, expected


NORMS = (2.0, 1.0, 0.0, math.inf, -math.inf, 3.0, 0.5)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("scope", [0, 1, 2])
def test_norms(norm_type: float, dtype: torch.dtype, scope: int) -> None:
    grads = [torch.randn(n).to(dtype) for n in SIZES]
    grads += [transposed(torch.randn(5, 7, 11).to(dtype), 3), torch.zeros(3, dtype=dtype)]
    grads += [torch.tensor(0.5, dtype=dtype).expand(300)]
    run, expected = norms_of(grads, norm_type, scope=scope, order=2, resident=2)
    got, want = doubles(run.norms), doubles(expected.norms)
    if norm_type in (3.0, 0.5):  # powers add up in 64 lanes here, one after another there
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    else:
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("misplaced", [1, 2, 3, 5, 7])
def test_norms_of_gradients_off_their_boundaries(misplaced: int) -> None:
    for dtype in (F32, F64, BF16):
        slots = [
            Slot("sgd", torch.zeros(n, dtype=dtype), torch.randn(n).to(dtype))
            for n in (1, 3, 61, 64, 67, 700, 8192, 8200, 33000)
        ]
        for slot in slots:
            slot.misplaced = (0, misplaced * dtype.itemsize, 0, 0, 0, 0)
        run = run_of("sgd", scope=2)
        expected = on_cpu(clone(slots), run)
        assert step(slots, run) == ""
        assert run.norms == expected.norms


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-22, 1e-16, 1e19, 1e25, 3e38])
def test_sums_that_float_cannot_hold(norm_type: float, size: float) -> None:
    grads = [torch.full((n,), size) for n in (1, 33, 8193, 40000)]
    grads += [torch.cat([torch.full((100,), size), torch.ones(9000)])]
    run, expected = norms_of(grads, norm_type, scope=2)
    assert run.norms == expected.norms


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients(norm_type: float, bad: float) -> None:
    for place, policy in itertools.product((0, 8300), (0, 1, 3)):
        slots = [make_slot("sgd_momentum", (n,)) for n in (100, 8301, 7)]
        assert slots[1].grad is not None
        slots[1].grad[place] = bad
        run = run_of("sgd_momentum", norm_type=norm_type, policy=policy, always_norm=True)
        if norm_type in (3.0, 0.5) and policy != 1:
            continue
        assert_same(slots, run)
        assert run.nonfinite
        assert run.nonfinite_tensors == [False, True, False]
        assert run.skipped == (policy == 1)


# ---- rows ----------------------------------------------------------------------------------------

# Many rows in a chunk, and in several; rows of several runs, and of several chunks; one row.
ROWS = [(700, 1), (33, 9), (2, 3, 5), (5, 8195), (3, 11, 3001), (2, 40000), (70001,), (1, 9), ()]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_clips_by_rows(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    slots = by_rows([make_slot("sgd_momentum", shape, dtypes) for shape in (*ROWS, (0, 4), (4, 0))])
    assert_same(slots, run_of("sgd_momentum", clip=AGC, order=2, resident=2))


@pytest.mark.parametrize("rule", [name for name in RULES if INFO[name].reads_grad])
def test_every_rule_with_a_clip_by_rows(rule: str) -> None:
    shapes = [(5, 33), (40, 3, 2), (77,), (3, 1500)]
    slots = [make_slot(rule, shape, dtypes) for shape in shapes for dtypes in DTYPES[::4]]
    slots += [make_slot(rule, shape, lay=transposed) for shape in shapes[:2]]
    assert_same(by_rows(slots), run_of(rule, clip=AGC), steps=2)


@pytest.mark.parametrize("lay", [transposed, with_gaps])
def test_rows_of_strided_operands(lay: Callable[[Tensor, int], Tensor]) -> None:
    for dtypes in [(F32, F32), (BF16, F32), (F64, F64), (F32, BF16)]:
        slots = [make_slot("adam", s, dtypes, lay=lay) for s in [(3, 5, 7), (2, 6007), (9, 5, 33)]]
        assert_same(by_rows(slots), run_of("adam", clip=AGC, order=1))


@pytest.mark.parametrize("misplaced", [1, 2, 3, 5])
def test_rows_off_their_16_byte_boundaries(misplaced: int) -> None:
    for dtypes in [(F32, F32), (BF16, F32), (F64, F64)]:
        off = [misplaced * x.itemsize for x in dtypes] + [0] * 4
        slots = [make_slot("sgd", s, dtypes, misplaced=off) for s in [(9, 67), (3, 9001), (50,)]]
        assert_same(by_rows(slots), run_of("sgd", clip=AGC))


@pytest.mark.parametrize("storage", [1, 2, 3], ids=["master", "kahan", "stochastic"])
def test_rows_of_16_bit_parameters(storage: int) -> None:
    """They are compared with the rows of the parameter, not with those of its master."""
    slots = [make_slot("adam", s, (BF16, F32), storage=storage, low=True) for s in [(5, 9), (3,)]]
    assert_same(by_rows(slots), run_of("adam", clip=AGC), steps=2)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("scope", [0, 1, 2])
def test_norms_beside_rows(norm_type: float, scope: int) -> None:
    """Tensors of one group are clipped by rows, those of the other by their norm."""
    slots = by_rows([make_slot("sgd_momentum", s) for s in [(5, 8195), (3,), (2, 40000)]])
    slots += [make_slot("sgd_momentum", s, group=1) for s in [(9000,), (7, 3)]]
    slots[1].grad = None
    run = Run(hypers=[hyper_of("sgd_momentum")] * 2, clips=[AGC, HARD])
    run.scope, run.norm_type = scope, norm_type
    assert_same(slots, run)


def test_rows_of_a_norm_that_accumulates() -> None:
    rule = "norm_accumulator_momentum"
    slots = by_rows([make_slot(rule, s) for s in [(5, 8195), (9, 31), (70001,)]])
    for scope in (0, 2):
        assert_same(slots, run_of(rule, clip=AGC, scope=scope), steps=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", [0, 1, 3])
def test_a_row_that_is_not_finite(bad: float, policy: int) -> None:
    slots = by_rows([make_slot("sgd", s) for s in [(5, 9000), (3, 7)]])
    assert slots[0].grad is not None
    slots[0].grad[2, 8999] = bad
    run = run_of("sgd", clip=AGC, policy=policy)
    assert_same(slots, run)
    assert run.nonfinite_tensors == [True, False]


def test_no_race_among_rows() -> None:
    slots = by_rows([make_slot("sgd", s) for s in [(130, 3), (2, 40000), (3, 9000)]])
    for order in (0, 1, 2):
        assert_same(slots, run_of("sgd", clip=AGC, order=order, resident=3, races=True))


def test_a_plan_knows_what_is_clipped_by_rows() -> None:
    slot = make_slot("sgd", (3, 4))
    assert "by rows" in step([slot], run_of("sgd", clip=AGC))
    assert "by rows" in step(by_rows([slot]), run_of("sgd"))
