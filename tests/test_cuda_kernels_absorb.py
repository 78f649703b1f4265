"""CUDA kernels that take gradients into states before the step: the CPU backend's bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_kernels import (
    BF16,
    BLOCK,
    DTYPES,
    F16,
    F32,
    F64,
    GLOBAL,
    INFO,
    NO_CLIP,
    SIZES,
    TENSOR,
    assert_same,
    bits,
    clone,
    hyper_of,
    make_slot,
    number,
    on_cpu,
    run_of,
    top_k,
    transposed,
    with_gaps,
)
from simt.emulated import Run, step
from torch import Tensor

ABSORBING = [name for name, rule in INFO.items() if rule.absorbs]
DECAY = 1 << 2  # in the rules' hyper-parameters
MAXIMIZE = (*NO_CLIP[:6], True)
SKIP, ZERO = 1, 3

every_rule = pytest.mark.parametrize("rule", ABSORBING)


def absorbing(rule: str, **settings: Any) -> Run:
    settings = {"clip": NO_CLIP, "absorbs": 1, "once": DECAY, "policy": SKIP, **settings}
    if INFO[rule].selects:
        settings = {"select": top_k(0.05), **settings}
    return run_of(rule, **settings)


@every_rule
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_every_rule_dtype_and_size(rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    slots = [make_slot(rule, (n,), dtypes) for n in SIZES]
    assert_same(slots, absorbing(rule, order=2, resident=2))


@every_rule
@pytest.mark.parametrize("compressor", [0.0, 1.0, 2.0, 3.0, 4.0])
def test_compressors(rule: str, compressor: float) -> None:
    if INFO[rule].selects and compressor:
        pytest.skip("a rule that selects takes no other compressor")
    hyper = {"compressor": compressor, "level": 8.0 if compressor == 3.0 else 0.05}
    for lr in (0.1, 0.0):
        slots = [make_slot(rule, (n,)) for n in (3, 2048, 9001)]
        assert_same(slots, absorbing(rule, hyper={**hyper, "lr": lr}, clip=MAXIMIZE), steps=2)


@pytest.mark.parametrize("scope", [TENSOR, GLOBAL, BLOCK], ids=["tensor", "global", "block"])
@pytest.mark.parametrize("kind", [1, 2], ids=["top_k", "rand_k"])
def test_selections(kind: int, scope: int) -> None:
    if (kind, scope) in ((2, GLOBAL), (2, BLOCK)):
        pytest.skip("rand-k has no other scope than a tensor")
    slots = [make_slot("ef_sgd_select", (n,), d) for n in (33, 5003, 12000) for d in DTYPES[::4]]
    slots[3].grad = None
    select = (kind, scope, 0.05, 0, 256, kind == 2, 7)
    assert_same(slots, absorbing("ef_sgd_select", select=select, order=1), steps=2)


@every_rule
@pytest.mark.parametrize("lay", [transposed, with_gaps])
def test_strided_operands(rule: str, lay: Callable[[Tensor, int], Tensor]) -> None:
    """The step walks in the order that gradients were taken in by: not always the CPU backend's."""
    for dtypes in [(F32, F32), (BF16, F32), (F64, F64)]:
        slots = [make_slot(rule, s, dtypes, lay=lay) for s in [(3, 5, 7), (13, 5, 33), (4, 0, 2)]]
        expected, got = clone(slots), clone(slots)
        run = absorbing(rule, absorbs=2)
        on_cpu(expected, run)
        assert step(got, run) == ""
        for a, b in zip(expected, got, strict=True):
            for x, y in zip(a.states, b.states, strict=True):
                assert torch.equal(bits(x), bits(y))


@every_rule
def test_operands_off_their_16_byte_boundaries(rule: str) -> None:
    for dtypes in [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F32)]:
        sizes = [x.itemsize for x in dtypes] + [8 if dtypes[0] == F64 else 4] * 4
        for way in ([size * 1 for size in sizes], [size * (k + 1) for k, size in enumerate(sizes)]):
            slots = [make_slot(rule, (n,), dtypes, misplaced=way) for n in (1, 5, 40, 2100, 8195)]
            assert_same(slots, absorbing(rule, order=2))


@every_rule
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32)], ids=str)
def test_bfloat16_residuals(rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    slots = [make_slot(rule, (n,), dtypes, low=True) for n in SIZES]
    assert_same(slots, absorbing(rule), steps=3)


@every_rule
@pytest.mark.parametrize("storage", [1, 2, 3], ids=["master", "kahan", "stochastic"])
def test_storage_of_16_bit_parameters(rule: str, storage: int) -> None:
    for low in (False, True):
        slots = [
            make_slot(rule, (n,), (BF16, F32), storage=storage, low=low) for n in (1, 33, 9000)
        ]
        assert_same(slots, absorbing(rule), steps=2)


@every_rule
def test_several_gradients_decay_once(rule: str) -> None:
    slots = [make_slot(rule, (n,)) for n in (5, 700, 33)]
    slots[2].absorbed = 4
    assert_same(slots, absorbing(rule, absorbs=2), steps=3)
    assert_same(slots, absorbing(rule))
    other = absorbing(rule)
    expected, got = clone(slots), clone(slots)
    for run in (absorbing(rule, absorbs=2), other):
        on_cpu(expected, run)
        assert step(got, run) == ""
    for a, b in zip(expected, got, strict=True):
        assert a.param is not None
        assert b.param is not None
        assert torch.equal(bits(a.param.detach()), bits(b.param))


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_gradients_that_are_not_finite(rule: str, bad: float, dtype: torch.dtype) -> None:
    wide = F64 if dtype == F64 else F32
    for place in (0, 5002, 9000):
        for policy in (SKIP, ZERO):
            slots = [make_slot(rule, (n,), (wide, dtype)) for n in (100, 9001, 7)]
            assert slots[1].grad is not None
            slots[1].grad[place] = bad
            run = absorbing(rule, policy=policy)
            assert_same(slots, run)
            assert run.kept_out == (policy == SKIP)


@every_rule
def test_no_race_in_any_order(rule: str) -> None:
    slots = [make_slot(rule, (n,)) for n in (3, 130, 4100)]
    slots += [make_slot(rule, (9000,), (BF16, BF16))]
    for order in (0, 1, 2):
        assert_same(slots, absorbing(rule, order=order, resident=3, races=True, multiprocessors=1))


def test_a_learning_rate_is_read_on_the_device() -> None:
    slots = [make_slot("ef_sgd_sign", (n,)) for n in (50, 4100)]
    expected = clone(slots)
    on_cpu(expected, absorbing("ef_sgd_sign", hyper={"lr": float(number(0.03, F32))}))
    assert step(slots, absorbing("ef_sgd_sign", hyper={"lr": number(0.03, F32)})) == ""
    for a, b in zip(expected, slots, strict=True):
        assert torch.equal(bits(a.states[0]), bits(b.states[0]))


def test_rules_that_do_not_absorb_are_refused() -> None:
    run = Run(hypers=[hyper_of("sgd")], clips=[NO_CLIP], absorbs=1)
    assert step([make_slot("sgd", (3,))], run) == "rule 'sgd' does not absorb gradients"
