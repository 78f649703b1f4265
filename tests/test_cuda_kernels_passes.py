"""What CUDA kernels make of norms, and passes before apply, emulated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cuda_kernels import (
    BF16,
    DTYPES,
    F32,
    F64,
    HARD,
    INFO,
    NO_CLIP,
    RULES,
    STAGED,
    assert_same,
    bits,
    clone,
    hyper_of,
    make_slot,
    number,
    on_cpu,
    run_of,
)
from simt.emulated import Run, Slot, step, tensors_of

# ---- finalize and prepare ------------------------------------------------------------------------

CLIPS = {
    "hard": HARD,
    "hard, nothing to do": (1, 1e9, 1e-6, 0.0, 0.0, -1.0, False),
    "smooth": (2, 0.7, 0.0, 0.0, 0.0, -1.0, False),
    "normalize": (3, 0.7, 1e-6, 0.0, 0.0, -1.0, True),
    "smoothness": (4, 0.0, 0.0, 2.0, 0.5, -1.0, False),
    "value": (0, 0.0, 0.0, 0.0, 0.0, 0.3, False),
    "none": NO_CLIP,
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("scope", [0, 1, 2])
@pytest.mark.parametrize("rule", ["sgd_momentum", "norm_accumulator_momentum", "clip21_sgd2m"])
def test_clips_scopes_and_groups(clip: Any, scope: int, rule: str) -> None:
    slots = [make_slot(rule, (n,), group=g) for g, n in enumerate((40, 3, 4500)) for _ in range(2)]
    slots[3].first = slots[5].first = False
    slots[4].grad = None
    run = Run(
        hypers=[hyper_of(rule, lr=lr) for lr in (0.1, 0.2, 0.3)],
        clips=[clip, HARD, clip],
        scope=scope,
        stage_scopes=(scope, scope),
        unscale=0.125,
    )
    assert_same(slots, run, steps=2)


def test_many_tensors_and_groups() -> None:
    rule = "sgd_momentum"
    slots = [make_slot(rule, (1 + i % 19,), group=i // 2) for i in range(620)]
    run = Run(hypers=[hyper_of(rule)] * 310, clips=[HARD] * 310)
    for scope in (0, 1, 2):
        run.scope = scope
        assert_same(slots, run)


def test_several_rules_and_dtypes_in_one_step() -> None:
    names = [name for name in RULES if INFO[name].reads_grad and not INFO[name].accumulates]
    slots = [
        make_slot(name, (70 + g,), DTYPES[g % len(DTYPES)], group=g) for g, name in enumerate(names)
    ]
    run = Run(hypers=[hyper_of(name) for name in names], clips=[HARD] * len(names))
    for stage_scopes in [(2, 0), (0, 2), (1, 1)]:
        run.stage_scopes = stage_scopes
        assert_same(slots, run, steps=2)


def test_numbers_are_read_from_the_device() -> None:
    """A learning rate and a loss scale in device memory give what their values give."""
    slots = [make_slot("adam", (50,)), make_slot("adam", (4100,))]
    by_value = run_of("adam", hyper={"lr": float(number(0.03, F32))}, unscale=0.125)
    expected = clone(slots)
    on_cpu(expected, by_value)
    for lr in (number(0.03, F32), number(float(number(0.03, F32)), F64)):
        got = clone(slots)
        run = run_of("adam", hyper={"lr": lr}, grad_scale=number(8.0, F32))
        assert step(got, run) == ""
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(bits(a.param.detach()), bits(b.param))


def test_found_inf_and_skipped_steps_change_nothing() -> None:
    for rule in RULES:
        slots = [make_slot(rule, (n,)) for n in (60, 2100)]
        before = clone(slots)
        assert step(slots, run_of(rule, found_inf=number(1.0, F32))) == ""
        for a, b in zip(before, slots, strict=True):
            assert b.first
            for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
                assert x is None or torch.equal(bits(x), bits(y))
        run = run_of(rule, found_inf=number(0.0, F32))
        expected = clone(before)
        on_cpu(expected, run)
        assert step(slots, run) == ""
        assert torch.equal(bits(expected[1].param.detach()), bits(slots[1].param))


def test_scale_rewrites_gradients_and_leaves_them_alone() -> None:
    """clip_grad_norm_: the one stream is the gradient itself."""
    grads = [torch.randn(n).to(dtype) for n in (5, 3000) for dtype in (F32, BF16, F64)]
    for max_norm in (1.0, 1e9):
        expected, got = copy.deepcopy(grads), copy.deepcopy(grads)
        run = run_of("scale", hyper={"coef": 1.0}, clip=(1, max_norm, 1e-6, 0, 0, -1.0, False))
        on_cpu([Slot("scale", g, g) for g in expected], run)
        run.skip_unit_coef = True
        assert step([Slot("scale", None, g) for g in got], run) == ""
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(bits(a), bits(b))


# ---- passes before apply -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [name for name in STAGED if name in RULES])
@pytest.mark.parametrize("compressor", [0.0, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_passes(rule: str, compressor: float, scale: float) -> None:
    slots = [make_slot(rule, (n,)) for n in (3, 2048, 33000)]
    level = 8.0 if compressor == 3.0 else 0.05 * scale
    hyper = {"compressor": compressor, "normalize": 1.0, "weight_decay": 0.0, "level": level}
    for slot in slots:
        assert slot.grad is not None
        slot.grad.mul_(scale)
        for state in slot.states:
            state.mul_(scale)
    run = run_of(rule, hyper=hyper, clip=NO_CLIP, order=2)
    if scale == 1.0:
        for lr in (0.1, 0.0):
            assert_same(slots, run_of(rule, hyper={**hyper, "lr": lr}, clip=NO_CLIP), steps=2)
        return
    # Squares overflow, or underflow: other sums stand in, right to a few units in the last place.
    expected, got = clone(slots), clone(slots)
    on_cpu(expected, run)
    assert step(got, run) == ""
    for a, b in zip(expected, got, strict=True):
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            if x is not None:
                bound = 1e-5 * float(x.detach().abs().max())
                torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=bound)


@pytest.mark.parametrize(
    "rule", [name for name in STAGED if name in RULES and "compressor" in INFO[name].hyper]
)
@pytest.mark.parametrize("compressor", [3.0, 4.0])
def test_compressors_that_draw_in_double(rule: str, compressor: float) -> None:
    slots = [make_slot(rule, (n,), (F64, F64)) for n in (3, 2048, 9001)]
    hyper = {"compressor": compressor, "level": 8.0, "weight_decay": 0.0}
    assert_same(slots, run_of(rule, hyper=hyper, clip=NO_CLIP), steps=2)
