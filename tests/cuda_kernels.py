"""What the tests of the CUDA kernels share: operands, the same step on the CPU backend, comparison.

Every kernel of csrc/cuda runs in them as it is, on the host (tests/simt), in several orders of
threads and blocks, with memory around every operand that cannot be touched.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

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
AGC = (5, 0.3, 1e-3, 0.0, 0.0, -1.0, False)
SELECTING = [name for name in INFO if INFO[name].selects or INFO[name].marks]
TOP_K, RAND_K = 1, 2
TENSOR, GLOBAL, BLOCK = 0, 1, 2
BLOCK_SCALES = 3  # the scope of a pass whose sums are scales of blocks


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
        select=run.select if run.select[0] or run.stage_scopes[0] == BLOCK_SCALES else None,
        low_states=low,
        param_storage=[slot.storage for slot in slots],
        by_rows=[slot.by_rows for slot in slots],
        sums=[None] * len(slots),
        absorbs=bool(run.absorbs),
    )
    out = Run()
    with torch.no_grad():
        for t, slot in enumerate(slots) if run.absorbs else ():
            if slot.grad is None:
                continue
            hyper = [
                0.0 if slot.absorbed and run.once >> i & 1 else value
                for i, value in enumerate(run.hypers[slot.group])
            ]
            state_dicts[t]["absorbed"] = slot.absorbed
            out.kept_out += plan.absorb(t, tuple(hyper), run.clips[slot.group], 2) != 0
            slot.absorbed = state_dicts[t]["absorbed"]
            params[t].grad = None
        took_part = [bool(s.absorbed) if run.absorbs else s.grad is not None for s in slots]
        if run.absorbs != 2:
            outcome = plan.step(groups, run.hypers, run.clips, 2, run.unscale, False)
            out.skipped = outcome != 0
            for slot in slots if run.absorbs else ():
                slot.absorbed = 0
    if plan.reduced:
        out.norms, out.coefs = list(plan.norms()), list(plan.coefs())
    for slot, took in zip(slots, took_part, strict=True):
        slot.first = slot.first and (out.skipped or not took or run.absorbs == 2)
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
        assert not run.absorbs or run.kept_out == before.kept_out
        if before.norms:
            assert torch.equal(bits(doubles(run.norms)), bits(doubles(before.norms)))
            assert torch.equal(bits(doubles(run.coefs)), bits(doubles(before.coefs)))
    for t, (a, b) in enumerate(zip(expected, got, strict=True)):
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            if x is not None:
                same = torch.equal(bits(x.detach()), bits(y.detach()))
                assert same, f"{a.rule}, tensor {t}, {tuple(x.shape)}, {x.dtype}"
        assert a.first == b.first or a.grad is None or a.grad.numel() == 0
        assert a.absorbed == b.absorbed


def run_of(rule: str, **settings: Any) -> Run:
    clip = settings.pop("clip", HARD)
    hyper = settings.pop("hyper", {})
    if INFO[rule].marks and "select" in settings:
        hyper = {"compressor": MARKS, **hyper}
    return Run(hypers=[hyper_of(rule, **hyper)], clips=[clip], **settings)


def transposed(x: Tensor, k: int) -> Tensor:
    """Every operand with another order of dimensions."""
    order = list(itertools.permutations(range(x.ndim)))[k % math.factorial(x.ndim)]
    back = [order.index(d) for d in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def with_gaps(x: Tensor, k: int) -> Tensor:
    spread = torch.zeros((*x.shape, 2 + k), dtype=x.dtype)[..., 0]
    return spread.copy_(x)


def by_rows(slots: Sequence[Slot]) -> list[Slot]:
    for slot in slots:
        slot.by_rows = True
        assert slot.grad is not None
        if slot.grad.dim() > 1 and slot.grad.numel() > 0:
            slot.grad[0] *= 1e-4  # nothing to clip
            slot.grad[-1] = 0.0
    return list(slots)


def top_k(ratio: float, scope: int = TENSOR, k: int = 0, block: int = 1024) -> Any:
    return (TOP_K, scope, ratio, k, block, False, 0)
