"""The CUDA kernels of every rule, emulated: the CPU backend's bits, whatever the operands are."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cuda_kernels import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    INFO,
    RULES,
    SIZES,
    assert_same,
    make_slot,
    run_of,
    transposed,
    with_gaps,
)
from torch import Tensor

from pysmooth import _cpu


def test_rules_are_the_cpu_backends() -> None:
    known = {rule["name"]: (rule["hyper"], rule["states"]) for rule in _cpu.rules()}
    assert {name: (rule.hyper, rule.states) for name, rule in INFO.items()} == known


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_every_rule_dtype_and_size(rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if not INFO[rule].reads_grad and dtypes[0] != dtypes[1]:
        pytest.skip("reads no gradient, so there is no second dtype")
    slots = [make_slot(rule, (n,), dtypes) for n in SIZES]
    assert_same(slots, run_of(rule, order=2, resident=2))


@pytest.mark.parametrize("lay", [transposed, with_gaps])
@pytest.mark.parametrize("rule", RULES)
def test_strided_operands(rule: str, lay: Callable[[Tensor, int], Tensor]) -> None:
    for dtypes in [(F32, F32), (BF16, F32), (F64, F64)]:
        shapes = [(3, 5, 7), (2, 33), (13, 5, 33), (4, 0, 2)]
        slots = [make_slot(rule, shape, dtypes, lay=lay) for shape in shapes]
        assert_same(slots, run_of(rule, order=1))


@pytest.mark.parametrize("rule", RULES)
def test_operands_off_their_16_byte_boundaries(rule: str) -> None:
    """Together, so that a head is peeled, and each in another way."""
    for dtypes in [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F32)]:
        sizes = [x.itemsize for x in dtypes] + [8 if dtypes[0] == F64 else 4] * 4
        ways = [[size * 1 for size in sizes], [4 if size == 2 else 8 for size in sizes]]
        ways += [[size * (k + 1) for k, size in enumerate(sizes)]]
        slots = [
            make_slot(rule, (n,), dtypes, misplaced=way)
            for n, way in itertools.product((1, 5, 40, 2100, 8195), ways)
        ]
        assert_same(slots, run_of(rule, order=2))


@pytest.mark.parametrize("rule", [name for name in RULES if INFO[name].low_states])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32)], ids=str)
def test_bfloat16_states_get_the_same_noise(
    rule: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    slots = [make_slot(rule, (n,), dtypes, low=True) for n in SIZES]
    slots += [make_slot(rule, (5, 41), dtypes, low=True, lay=transposed)]
    slots += [make_slot(rule, (99,), dtypes, low=True, misplaced=(4, 4, 2, 2, 2, 2))]
    assert_same(slots, run_of(rule), steps=3)


@pytest.mark.parametrize("rule", [name for name in RULES if INFO[name].reads_grad])
@pytest.mark.parametrize("storage", [1, 2, 3], ids=["master", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_storage_of_16_bit_parameters(rule: str, storage: int, dtype: torch.dtype) -> None:
    if storage == 3 and dtype == F16:
        pytest.skip("stochastic rounding is for bfloat16 alone")
    sizes = (1, 33, 2049, 8195)
    low = bool(INFO[rule].low_states)
    slots = [make_slot(rule, (n,), (dtype, F32), storage=storage, low=low) for n in sizes]
    slots += [make_slot(rule, (3, 5, 7), (dtype, dtype), storage=storage, lay=transposed)]
    slots += [make_slot(rule, (99,), (dtype, dtype), storage=storage, misplaced=(2, 2) + (4,) * 4)]
    assert_same(slots, run_of(rule), steps=2)


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_without_gradient_sits_out(rule: str) -> None:
    slots = [make_slot(rule, (n,)) for n in (5, 700, 33)]
    if INFO[rule].reads_grad:
        slots[1].grad = None
    slots[2].first = False
    assert_same(slots, run_of(rule, multiprocessors=1), steps=2)


@pytest.mark.parametrize("rule", RULES)
def test_no_race_in_any_order(rule: str) -> None:
    slots = [make_slot(rule, (n,)) for n in (3, 130, 4100)]
    slots += [make_slot(rule, (9000,), (BF16, BF16) if INFO[rule].reads_grad else (F32, F32))]
    for order in (0, 1, 2):
        assert_same(slots, run_of(rule, order=order, resident=3, races=True, multiprocessors=1))
