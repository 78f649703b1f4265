"""The CUDA kernels, emulated, against the CPU backend: the same bits, whatever the operands are.

Every kernel of csrc/cuda runs here as it is, on the host (tests/simt), in several orders of threads
and blocks, with memory around every operand that cannot be touched.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from simt.emulated import Run, Slot, rules, step, tensors_of
from torch import Tensor
from torch.nn import Parameter

from pysmooth import _cpu

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INFO = rules()
STAGED = [name for name, rule in INFO.items() if rule.stages > 0]
# What selects has tests of its own; what marks has them, too.
RULES = [name for name, rule in INFO.items() if not rule.selects]
# Ends of words, rows, runs, warps' pieces and chunks.
SIZES = (0, 1, 7, 31, 33, 64, 1023, 2049, 8191, 8193, 32767, 32769)
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (BF16, F32), (F16, F16)]
DTYPES += [(F16, F32), (F64, F64), (F64, F32)]
# Values under which a rule does all that it can; the rest is 0.
HYPER = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.1,
    "weight_decay": 0.01,
    "eps": 1e-6,
    "beta1": 0.9,
    "beta2": 0.99,
    "beta": 0.3,
    "beta_hat": 0.4,
    "tau": 0.5,
    "eta": 0.2,
    "keep": 0.9,
    "admit": 0.1,
    "lr_decay": 0.1,
    "coef": 0.5,
    "level": 0.05,
    "compressor": 1.0,
}
MARKS = 5.0  # the compressor that takes what was selected
NO_CLIP = (0, 0.0, 0.0, 0.0, 0.0, -1.0, False)
HARD = (1, 1.0, 1e-6, 0.0, 0.0, -1.0, False)


def hyper_of(rule: str, **given: float) -> tuple[float, ...]:
    return tuple(given.get(name, HYPER.get(name, 0.0)) for name in INFO[rule].hyper)


def bits(x: Tensor) -> Tensor:
    """Bit patterns, all NaN alike."""
    x = torch.where(x.isnan(), torch.full_like(x, math.nan), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def make_slot(
    rule: str,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    *,
    low: bool = False,
    storage: int = 0,
    group: int = 0,
    lay: Callable[[Tensor, int], Tensor] = lambda x, k: x,
    misplaced: Sequence[int] = (0,) * 6,
) -> Slot:
    """A parameter with random contents; lay(x, k) gives operand k its layout."""
    info = INFO[rule]
    wide = F64 if dtypes[0] == F64 else F32
    states = [lay(torch.rand(shape).to(wide), 2 + k) for k in range(info.states)]
    if low:
        for k in range(info.states):
            if info.low_states >> k & 1:
                states[k] = lay(states[k].to(BF16), 2 + k)
    param = lay(torch.randn(shape).to(dtypes[0]), 0)
    grad = lay(torch.randn(shape).to(dtypes[1]), 1) if info.reads_grad else param
    if storage in (1, 2):  # a master, or what a Kahan sum keeps
        rest = param.float() if storage == 1 else (torch.randn(shape) * 1e-3).to(dtypes[0])
        states.append(lay(rest, 2 + len(states)))
    return Slot(
        rule,
        param,
        grad,
        states,
        norm_sq=number(0.3, F64) if info.accumulates else None,
        scale=number(0.2, F64) if info.keeps_scale else None,
        steps=number(3.0, F32) if info.counts_steps or storage == 3 else None,
        group=group,
        storage=storage,
        misplaced=misplaced,
    )


def on_cpu(slots: Sequence[Slot], run: Run) -> Run:
    """The same step on the CPU backend, in place."""
    params, state_dicts, keys, low = [], [], [], []
    groups: list[list[Tensor]] = [[] for _ in run.hypers]
    for slot in slots:
        assert slot.param is not None
        p = Parameter(slot.param)
        if slot.grad is not None:
            if slot.grad.dtype != p.dtype:
                p.grad_dtype = slot.grad.dtype
            p.grad = slot.grad
        numbers = {"norm_sq": slot.norm_sq, "scale": slot.scale, "step": slot.steps}
        state: dict[str, Any] = {f"state{k}": x for k, x in enumerate(slot.states)}
        state |= {key: x for key, x in numbers.items() if x is not None}
        params.append(p)
        groups[slot.group].append(p)
        state_dicts.append(state)
        keys.append(tuple(state))
        own = slot.states[: INFO[slot.rule].states]
        low.append(sum(1 << k for k, x in enumerate(own) if x.dtype == BF16))
    plan = _cpu.Plan(
        params=params,
        state_dicts=state_dicts,
        state_keys=keys,
        rules=[slot.rule for slot in slots],
        groups=[slot.group for slot in slots],
        names=[str(i) for i in range(len(slots))],
        first=[slot.first for slot in slots],
        state_roots=[],
        scope=run.scope,
        policy=run.policy,
        norm_type=run.norm_type,
        stage_scopes=list(run.stage_scopes),
        select=run.select if run.select[0] else None,
        low_states=low,
        param_storage=[slot.storage for slot in slots],
        by_rows=[slot.by_rows for slot in slots],
        sums=[None] * len(slots),
        absorbs=False,
    )
    with torch.no_grad():
        outcome = plan.step(groups, run.hypers, run.clips, 2, run.unscale, False)
    out = Run(skipped=outcome != 0)
    if plan.reduced:
        out.norms, out.coefs = list(plan.norms()), list(plan.coefs())
    for slot in slots:
        slot.first = slot.first and (out.skipped or slot.grad is None)
    return out


def clone(slots: Sequence[Slot]) -> list[Slot]:
    """The same slots with the same layouts, in memory of their own."""
    return copy.deepcopy(list(slots))


def assert_same(slots: Sequence[Slot], run: Run, steps: int = 1) -> None:
    """Steps of both backends, from the same state, end in the same bits."""
    expected, got = clone(slots), clone(slots)
    for _ in range(steps):
        before = on_cpu(expected, run)
        assert step(got, run) == ""
        assert run.skipped == before.skipped
        if before.norms:
            assert torch.equal(bits(doubles(run.norms)), bits(doubles(before.norms)))
            assert torch.equal(bits(doubles(run.coefs)), bits(doubles(before.coefs)))
    for t, (a, b) in enumerate(zip(expected, got, strict=True)):
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            if x is not None:
                same = torch.equal(bits(x.detach()), bits(y.detach()))
                assert same, f"{a.rule}, tensor {t}, {tuple(x.shape)}, {x.dtype}"
        assert a.first == b.first or a.grad is None or a.grad.numel() == 0


def run_of(rule: str, **settings: Any) -> Run:
    clip = settings.pop("clip", HARD)
    hyper = settings.pop("hyper", {})
    if INFO[rule].marks and "select" in settings:
        hyper = {"compressor": MARKS, **hyper}
    return Run(hypers=[hyper_of(rule, **hyper)], clips=[clip], **settings)


# ---- every rule ----------------------------------------------------------------------------------


def test_rules_are_the_cpu_backends() -> None:
    known = {rule["name"]: (rule["hyper"], rule["states"]) for rule in _cpu.rules()}
    assert {name: (rule.hyper, rule.states) for name, rule in INFO.items()} == known


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
def test_every_rule_dtype_and_size(rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if not INFO[rule].reads_grad and dtypes[0] != dtypes[1]:
        pytest.skip("one stream")
    slots = [make_slot(rule, (n,), dtypes) for n in SIZES]
    assert_same(slots, run_of(rule, order=2, resident=2))


def transposed(x: Tensor, k: int) -> Tensor:
    """Every operand with another order of dimensions."""
    order = list(itertools.permutations(range(x.ndim)))[k % math.factorial(x.ndim)]
    back = [order.index(d) for d in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def with_gaps(x: Tensor, k: int) -> Tensor:
    spread = torch.zeros((*x.shape, 2 + k), dtype=x.dtype)[..., 0]
    return spread.copy_(x)


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
        pytest.skip("bfloat16 alone is rounded at random")
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

AGC = (5, 0.3, 1e-3, 0.0, 0.0, -1.0, False)
# Many rows in a chunk, and in several; rows of several runs, and of several chunks; one row.
ROWS = [(700, 1), (33, 9), (2, 3, 5), (5, 8195), (3, 11, 3001), (2, 40000), (70001,), (1, 9), ()]


def by_rows(slots: Sequence[Slot]) -> list[Slot]:
    for slot in slots:
        slot.by_rows = True
        assert slot.grad is not None
        if slot.grad.dim() > 1 and slot.grad.numel() > 0:
            slot.grad[0] *= 1e-4  # nothing to clip
            slot.grad[-1] = 0.0
    return list(slots)


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


@pytest.mark.parametrize("rule", [name for name in INFO if INFO[name].marks])
def test_rules_that_mark_selections_are_refused(rule: str) -> None:
    slots = [make_slot("sgd", (3,)), make_slot(rule, (33,), group=1)]
    before = clone(slots)
    run = Run(hypers=[hyper_of("sgd"), hyper_of(rule)], clips=[NO_CLIP] * 2)
    assert step(slots, run) == f"{rule} has no CUDA kernel"
    for a, b in zip(before, slots, strict=True):
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            assert x is y is None or torch.equal(x, y)


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


# ---- select -------------------------------------------------------------------------------------

SELECTING = [name for name in INFO if INFO[name].selects or INFO[name].marks]
TOP_K, RAND_K = 1, 2
TENSOR, GLOBAL, BLOCK = 0, 1, 2


def top_k(ratio: float, scope: int = TENSOR, k: int = 0, block: int = 1024) -> Any:
    return (TOP_K, scope, ratio, k, block, False, 0)


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
