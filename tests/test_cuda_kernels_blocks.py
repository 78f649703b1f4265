"""Compressors with a scale per block, in CUDA kernels, emulated: the CPU backend's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_kernels import AGC as ROWS
from cuda_kernels import (
    BF16,
    BLOCK_SCALES,
    DTYPES,
    F32,
    F64,
    INFO,
    NO_CLIP,
    assert_same,
    by_rows,
    clone,
    hyper_of,
    make_slot,
    run_of,
    transposed,
    with_gaps,
)
from simt.emulated import Run, step
from torch import Tensor

SCALING = [name for name, rule in INFO.items() if rule.scales]
SCALED_SIGN, QSGD = 1.0, 3.0
# Less than a thread's group, than a row, than a run; a run, and several.
BLOCKS = (1, 2, 4, 16, 32, 64, 128, 1024, 2048, 4096, 32768)
SIZES = (0, 1, 31, 64, 100, 1023, 2049, 12345, 40001)
every_rule = pytest.mark.parametrize("rule", SCALING)


def blocks_of(rule: str, block: int, **settings: Any) -> Run:
    hyper = {"compressor": QSGD, "level": 4.0, "normalize": 1.0, **settings.pop("hyper", {})}
    plus = rule.startswith("ef21_plus")
    # The passes that scale; then errors of messages, and the norm of what is followed.
    scopes = (BLOCK_SCALES, BLOCK_SCALES, 2, 2, 0) if plus else (BLOCK_SCALES, 0)
    settings = {"clip": NO_CLIP, "stage_scopes": scopes, **settings}
    return run_of(rule, hyper=hyper, **settings, select=(0, 2, 0.0, 0, block, False, 0))


@every_rule
@pytest.mark.parametrize("block", BLOCKS)
def test_every_rule_and_block(rule: str, block: int) -> None:
    most = 300 if block < 8 else 50_000  # what the emulation has time for
    slots = [make_slot(rule, (n,)) for n in SIZES if n < most]
    assert_same(slots, blocks_of(rule, block, order=2, resident=2), steps=2)


@every_rule
@pytest.mark.parametrize("block", [16, 256])
def test_scales_that_are_means_of_magnitudes(rule: str, block: int) -> None:
    slots = [make_slot(rule, (n,)) for n in (1, 31, 100, 2049)]
    assert_same(slots, blocks_of(rule, block, hyper={"compressor": SCALED_SIGN}))


@every_rule
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_dtypes(rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for block in (8, 512):
        slots = [make_slot(rule, (n,), dtypes) for n in (1, 33, 1500, 4097)]
        assert_same(slots, blocks_of(rule, block))


@every_rule
@pytest.mark.parametrize("lay", [transposed, with_gaps])
def test_strided_operands(rule: str, lay: Callable[[Tensor, int], Tensor]) -> None:
    for block in (16, 64):
        slots = [make_slot(rule, s, lay=lay) for s in [(3, 5, 7), (13, 5, 33), (4, 0, 2)]]
        assert_same(slots, blocks_of(rule, block, order=1))


@every_rule
def test_operands_off_their_16_byte_boundaries(rule: str) -> None:
    """Of neighbours in a thread's group some belong to the next block, or to the next row."""
    for dtypes in [(F32, F32), (BF16, BF16), (F64, F32)]:
        sizes = [x.itemsize for x in dtypes] + [8 if dtypes[0] == F64 else 4] * 4
        for way in (sizes, [4 if size == 2 else 8 for size in sizes]):
            slots = [make_slot(rule, (n,), dtypes, misplaced=way) for n in (5, 70, 2100, 5003)]
            for block in (2, 32, 64, 1024):
                assert_same(slots, blocks_of(rule, block))


@every_rule
@pytest.mark.parametrize("scale", [1e-20, 1e-23, 1e15, 1e25])
def test_sums_that_float_cannot_hold(rule: str, scale: float) -> None:
    """Short blocks are added up again in double; longer ones in scaled values, to 1e-5."""
    slots = [make_slot(rule, (n,)) for n in (40, 3000)]
    for slot in slots:
        assert slot.grad is not None
        slot.grad.mul_(scale)
        for state in slot.states:
            state.mul_(scale)
    hyper = {"weight_decay": 0.0, "normalize": 0.0, "compressor": QSGD}
    assert_same(slots, blocks_of(rule, 16, hyper=hyper))


@pytest.mark.parametrize("rule", [name for name in SCALING if INFO[name].low_states])
def test_bfloat16_residuals(rule: str) -> None:
    for block in (16, 256, 4096):
        slots = [make_slot(rule, (n,), (BF16, F32), low=True) for n in (33, 2100, 9001)]
        assert_same(slots, blocks_of(rule, block), steps=2)


@every_rule
def test_storage_of_16_bit_parameters(rule: str) -> None:
    for storage in (1, 2, 3):
        slots = [make_slot(rule, (n,), (BF16, F32), storage=storage) for n in (33, 2100)]
        assert_same(slots, blocks_of(rule, 256), steps=2)


@every_rule
def test_a_clip_by_rows_and_a_tensor_without_gradient(rule: str) -> None:
    slots = by_rows([make_slot(rule, shape) for shape in [(9, 67), (3, 5, 700), (50,)]])
    slots[2].grad = None
    assert_same(slots, blocks_of(rule, 64, clip=ROWS), steps=2)


@every_rule
@pytest.mark.parametrize("scope", [0, 1, 2])
def test_other_passes_are_summed_up_over_their_scope(rule: str, scope: int) -> None:
    slots = [make_slot(rule, (n,), group=g) for g, n in enumerate((700, 40_000, 33))]
    for block in (32, 512, 8192):
        run = blocks_of(rule, block)
        run.hypers, run.clips = [run.hypers[0]] * 3, [NO_CLIP] * 3
        run.stage_scopes = [s if s == BLOCK_SCALES else scope for s in run.stage_scopes]
        assert_same(slots, run)


@every_rule
def test_no_race_in_any_order(rule: str) -> None:
    for order, block in ((0, 16), (1, 64), (2, 1024), (2, 4096)):
        slots = [make_slot(rule, (n,)) for n in (3, 130, 4100)]
        assert_same(slots, blocks_of(rule, block, order=order, resident=3, races=True))


@pytest.mark.parametrize("rule", [name for name in SCALING if INFO[name].absorbs])
@pytest.mark.parametrize("block", [4, 64, 1024, 8192])
def test_absorbed_gradients(rule: str, block: int) -> None:
    for low in (False, True):
        slots = [make_slot(rule, (n,), low=low) for n in (3, 130, 2049, 9001)]
        run = blocks_of(rule, block, absorbs=1, once=4, policy=1, races=True)
        assert_same(slots, run, steps=2)


def test_nothing_is_sent_at_a_learning_rate_of_zero() -> None:
    slots = [make_slot("ef_sgd_dense", (n,)) for n in (33, 3000)]
    assert_same(slots, blocks_of("ef_sgd_dense", 64, hyper={"lr": 0.0}))


def test_other_blocks_and_rules_are_refused() -> None:
    slot = make_slot("ef_sgd_dense", (9,))
    assert step([clone([slot])[0]], blocks_of("ef_sgd_dense", 100)) == (
        "blocks that do not divide 32768"
    )
    run = Run(hypers=[hyper_of("clip21")], clips=[NO_CLIP], stage_scopes=(BLOCK_SCALES, 0))
    assert step([make_slot("clip21", (9,))], run) == "rule 'clip21' has no scales of blocks"
