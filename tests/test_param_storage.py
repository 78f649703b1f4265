"""16-bit parameters with master weights, Kahan's compensation or stochastic rounding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from battery import (
    SHAPES,
    advance,
    assert_same_bits,
    assert_same_snapshot,
    assert_unchanged,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
)
from registry import Entry
from rounding import neighbours
from torch import Tensor

from pysmooth import EF21, EFSGD, AdamW, ClipSGD, Lion, Signum, TopK, _cpu

MASTER: dict[str, Any] = {"master_weights": True}
KAHAN: dict[str, Any] = {"kahan": True}
NOISY: dict[str, Any] = {"stochastic_rounding": True}
STORAGE = {"master": MASTER, "kahan": KAHAN, "stochastic": NOISY}
every_storage = pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE.keys())
MAKES: dict[str, Any] = {
    "adamw": lambda p, **kw: AdamW(p, 0.01, max_norm=1.0, **kw),
    "adamw-bf16-states": lambda p, **kw: AdamW(p, 0.01, state_dtype=torch.bfloat16, **kw),
    "signum": lambda p, **kw: Signum(p, 0.01, weight_decay=0.1, **kw),
    "ef_sgd-top-k": lambda p, **kw: EFSGD(p, 0.1, TopK(ratio=0.1), weight_decay=0.01, **kw),
    "ef21-top-k": lambda p, **kw: EF21(p, 0.1, TopK(ratio=0.1), weight_decay=0.01, **kw),
}
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def half(shapes: Any = SHAPES, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    return make_params(shapes, dtype)


def value(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """What the parameter and its companion stand for, in float32."""
    state = optimizer.state[p]
    if "master_param" in state:
        return state["master_param"].clone()
    return p.detach().float() + state["compensation"].float()


# ---- numbers ------------------------------------------------------------------------------------


@every_backend
@every_entry
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_master_takes_the_steps_of_a_float32_parameter(
    entry: Entry, backend: str, dtype: torch.dtype
) -> None:
    params = half(dtype=dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    rows = record_grads(params, 6)
    optimizer = entry.build(params, backend, **MASTER)
    twin = entry.build(wide, backend)
    advance(optimizer, params, rows)
    advance(twin, wide, rows)
    for p, w in zip(params, wide, strict=True):
        state = dict(optimizer.state[p])
        assert state["master_param"].dtype == torch.float32
        assert_same_bits([state.pop("master_param"), p], [w, w.detach().to(dtype)])
        assert state.keys() == twin.state[w].keys()
        assert_same_bits(state.values(), twin.state[w].values())


@every_backend
@every_entry
def test_kahan_follows_the_master(entry: Entry, backend: str) -> None:
    """p + c has 16 bits or more: every step rounds once, by less than 2^-16 of the value.

    And p is what p + c rounds to.
    """
    steps = 8
    params, others = half(), half()
    rows = record_grads(params, steps)
    optimizer, exact = entry.build(params, backend, **KAHAN), entry.build(others, backend, **MASTER)
    sizes = [p.detach().float().abs() for p in params]
    for row in rows:
        advance(optimizer, params, [row])
        advance(exact, others, [row])
        sizes = [s.maximum(value(exact, q).abs()) for s, q in zip(sizes, others, strict=True)]
    for p, q, size in zip(params, others, sizes, strict=True):
        assert optimizer.state[p]["compensation"].dtype == torch.bfloat16
        error = (value(optimizer, p) - value(exact, q)).abs()
        assert bool((error <= steps * 2**-16 * size.clamp_min(2**-10)).all())
        assert same_bits(value(optimizer, p).to(torch.bfloat16), p.detach())


@every_backend
@every_entry
def test_a_step_rounds_to_one_of_two_neighbours(entry: Entry, backend: str) -> None:
    params, others = half(), half()
    rows = record_grads(params, 3)[2:]  # large ones: nothing is below a compressor's threshold
    advance(entry.build(params, backend, **NOISY), params, rows)
    exact = entry.build(others, backend, **MASTER)
    advance(exact, others, rows)
    ups = total = 0
    for p, q in zip(params, others, strict=True):
        low, high = neighbours(value(exact, q))
        found = p.detach().float()
        assert bool(((found == low) | (found == high)).all())
        ups += int(((found == high) & (low != high)).sum())
        total += int((low != high).sum())
    assert 0 < ups < total


@every_backend
def test_what_is_too_small_for_plain_parameters(backend: str) -> None:
    """Steps of 1/32 of the last place: to nearest nothing moves, in 1,000 steps."""
    found = {}
    for name, kwargs in {"plain": {}, **STORAGE}.items():
        p = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = ClipSGD([p], 2.0**-13, backend=backend, **kwargs)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        found[name] = p.detach().float()
    want = 1 - 1000 * 2**-13
    assert bool((found["plain"] == 1).all())
    assert bool((found["master"] == torch.tensor(want).to(torch.bfloat16)).all())
    assert float((found["kahan"] - want).abs().max()) < 2**-7
    # A walk of 1,000 steps, each of variance below 2^-8 * 2^-13: 0.02 in the end, and its mean.
    assert float(found["stochastic"].mean()) == pytest.approx(want, abs=5 * 0.022 / 4000**0.5)
    assert 0.005 < float(found["stochastic"].std()) < 0.03


@every_backend
@pytest.mark.parametrize("form", ["apply", "selected"])
def test_rounding_is_right_in_the_mean(form: str, backend: str) -> None:
    """Also where one step rounds twice: EF21 moves along the estimate, then repairs."""
    p = torch.nn.Parameter(torch.full((40_000,), 1.5, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.3)
    optimizer: torch.optim.Optimizer = ClipSGD([p], 2.0**-8, backend=backend, **NOISY)
    if form == "selected":
        optimizer = EF21([p], 2.0**-8, TopK(ratio=1.0), init="full", backend=backend, **NOISY)
        p.grad = torch.full_like(p, 0.15)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 2.0**-8
        p.grad = torch.full_like(p, 0.3)
    start = p.detach().float().mean()
    optimizer.step()
    moved = float(start - p.detach().float().mean())
    exact = float(p.grad[0]) * 2**-8
    assert moved == pytest.approx(exact, abs=5 * 2**-7 / 40_000**0.5)


@every_backend
def test_the_float16_range(backend: str) -> None:
    """Beyond it a parameter is infinite; its compensation is not the negative infinity."""
    p = torch.nn.Parameter(torch.tensor([65504.0, 1.0], dtype=torch.float16))
    optimizer = ClipSGD([p], 1.0, backend=backend, **KAHAN)
    for _ in range(2):
        p.grad = torch.tensor([-1000.0, 2.0**-12], dtype=torch.float16)
        optimizer.step()
    assert float(p[0].detach()) == float("inf")
    assert float(optimizer.state[p]["compensation"][0]) == 0
    assert float(value(optimizer, p)[1]) == 1 - 2**-11


# ---- the same everywhere ------------------------------------------------------------------------

NO_SUMS: dict[str, Any] = {
    "sgd": lambda p, **kw: ClipSGD(p, 0.1, momentum=0.9, weight_decay=0.01, **kw),
    "signum": MAKES["signum"],
    "lion": lambda p, **kw: Lion(p, 0.01, weight_decay=0.1, **kw),
    "ef_sgd-top-k": MAKES["ef_sgd-top-k"],
    "ef21-top-k": MAKES["ef21-top-k"],
}


@every_storage
@pytest.mark.parametrize("make", NO_SUMS.values(), ids=NO_SUMS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_and_eager_have_the_same_bits(
    make: Any, storage: dict[str, Any], dtype: torch.dtype
) -> None:
    if storage is NOISY and dtype == torch.float16:
        pytest.skip("refused")
    results = []
    for backend in ("cpu", "eager"):
        params = half([s for s in [*SHAPES, (70, 31)] if 0 not in s], dtype)
        params[-1].data = params[-1].data.t().contiguous().t()
        optimizer = make(params, backend=backend, **storage)
        advance(optimizer, params, record_grads(params, 4))
        results.append(snapshot(optimizer))
    assert_same_snapshot(*results)


@every_storage
@every_make
@pytest.mark.parametrize("isa", _cpu.isa_levels())
def test_any_vector_width_thread_count_and_layout(
    make: Any, storage: dict[str, Any], isa: str
) -> None:
    results = []
    for threads in (None, 1, 2, 3):
        params = half([*SHAPES, (300, 250)])
        optimizer = make(params, backend="cpu", **storage)
        before = _cpu.isa(), torch.get_num_threads()
        try:
            if threads is not None:
                _cpu.set_isa(isa)
                torch.set_num_threads(threads)
            for row in record_grads(params, 3):
                if threads == 3:
                    row[-1] = row[-1].t().contiguous().t()
                set_grads(params, row)
                optimizer.step()
        finally:
            _cpu.set_isa(before[0])
            torch.set_num_threads(before[1])
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_same_snapshot(results[0], other)


@every_storage
@every_make
@every_backend
def test_a_view_of_a_larger_tensor_has_the_same_bits(
    make: Any, storage: dict[str, Any], backend: str
) -> None:
    whole = torch.full((64, 50), 7.0, dtype=torch.bfloat16)
    start = half([(64, 37)])[0].detach()
    results = []
    for p in (start.clone(), whole[:, :37]):
        p.copy_(start)
        p.requires_grad_()
        optimizer = make([p], backend=backend, **storage)
        advance(optimizer, [p], record_grads([p], 3))
        results.append(snapshot(optimizer))
    assert_same_snapshot(*results)
    assert bool((whole[:, 37:] == 7).all())


# ---- states -------------------------------------------------------------------------------------


@every_storage
@every_make
@every_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
def test_resumes_with_the_same_bits(
    make: Any, storage: dict[str, Any], backend: str, how: str
) -> None:
    params = half()
    rows = record_grads(params, 6)
    optimizer = make(params, backend=backend, **storage)
    advance(optimizer, params, rows[:3])
    if how == "checkpoint":
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = make(copies, backend=backend, **storage)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = (
            copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        )
        copies = other.param_groups[0]["params"]
    assert_same_snapshot(snapshot(optimizer), snapshot(other))
    advance(optimizer, params, rows[3:])
    advance(other, copies, rows[3:])
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


@every_backend
@pytest.mark.parametrize("storage", [MASTER, KAHAN], ids=["master", "kahan"])
def test_checkpoints_without_a_companion(storage: dict[str, Any], backend: str) -> None:
    """Torch's, or of a group that had none: it is made of the parameter, the rest goes on."""
    params, twins = half([(50,)]), half([(50,)])
    rows = record_grads(params, 3)
    source = torch.optim.SGD(params, 0.1, momentum=0.9)
    advance(source, params, rows[:1])
    optimizer = ClipSGD(twins, 0.1, momentum=0.9, backend=backend, **storage)
    twins[0].data.copy_(params[0].detach())
    optimizer.load_state_dict(source.state_dict())
    assert "master_param" not in optimizer.state[twins[0]]
    advance(optimizer, twins, rows[1:])

    wide = [torch.nn.Parameter(params[0].detach().float())]
    plain = ClipSGD(wide, 0.1, momentum=0.9, backend=backend)
    plain.load_state_dict(source.state_dict())
    advance(plain, wide, rows[1:])
    error = (value(optimizer, twins[0]) - wide[0].detach()).abs()
    assert float(error.max()) <= (0 if storage is MASTER else 2**-13)


@every_backend
def test_the_option_can_be_changed_between_steps(backend: str) -> None:
    params = half([(50,)])
    rows = record_grads(params, 4)
    optimizer = AdamW(params, 0.01, backend=backend, **KAHAN)
    advance(optimizer, params, rows[:2])
    group = optimizer.param_groups[0]
    group["kahan"], group["master_weights"] = False, True
    before = params[0].detach().clone()
    exact = AdamW(wide := [torch.nn.Parameter(before.float())], 0.01, backend=backend)
    exact.load_state_dict(optimizer.state_dict())
    advance(optimizer, params, rows[2:])
    advance(exact, wide, rows[2:])
    assert_same_bits([optimizer.state[params[0]]["master_param"]], wide)


@every_backend
@every_storage
def test_other_dtypes_in_the_group_are_not_affected(storage: dict[str, Any], backend: str) -> None:
    mixed = half([(33,)]) + make_params([(33,)]) + make_params([(33,)], torch.float64)
    plain = make_params([(33,)]) + make_params([(33,)], torch.float64)
    rows = record_grads(mixed, 3)
    optimizer = Signum(mixed, 0.01, backend=backend, **storage)
    twin = Signum(plain, 0.01, backend=backend)
    advance(optimizer, mixed, rows)
    advance(twin, plain, [row[1:] for row in rows])
    assert_same_bits(mixed[1:], plain)
    for p, q in zip(mixed[1:], plain, strict=True):
        assert optimizer.state[p].keys() == twin.state[q].keys()
    assert optimizer.state[mixed[0]].keys() > twin.state[plain[0]].keys()


@every_backend
@every_storage
def test_late_gradients_and_moved_storage(storage: dict[str, Any], backend: str) -> None:
    """A parameter is taken as it is when its first gradient comes, and its memory may move."""
    params, twins = half([(40,), (41,)]), half([(40,), (41,)])
    rows = record_grads(params, 4)
    optimizer = ClipSGD(params, 0.1, momentum=0.9, scope="tensor", backend=backend, **storage)
    for step, row in enumerate(rows):
        set_grads(params, [row[0], row[1] if step > 1 else None])
        if step == 1:
            params[1].data.mul_(2)
        params[0].data = params[0].data.clone()
        optimizer.step()
    twins[1].data.mul_(2)
    other = ClipSGD(twins, 0.1, momentum=0.9, scope="tensor", backend=backend, **storage)
    advance(other, twins, rows[2:])
    assert_same_bits(params[1:], twins[1:]) if storage is not NOISY else None
    if storage is MASTER:
        assert same_bits(value(optimizer, params[1]), value(other, twins[1]))


@every_backend
@pytest.mark.parametrize("storage", [MASTER, KAHAN], ids=["master", "kahan"])
def test_values_written_by_the_user(storage: dict[str, Any], backend: str) -> None:
    params, twins = half([(40,)]), half([(40,)])
    rows = record_grads(params, 4)
    optimizer = ClipSGD(params, 0.1, backend=backend, **storage)
    optimizer.sync_master_weights()  # nothing is held yet
    advance(optimizer, params, rows[:2])
    kept = value(optimizer, params[0])
    params[0].data.fill_(3.0)
    if storage is MASTER:  # unnoticed: the master is what counts
        assert same_bits(value(optimizer, params[0]), kept)
    optimizer.sync_master_weights()
    assert bool((value(optimizer, params[0]) == 3).all())
    twins[0].data.fill_(3.0)
    advance(optimizer, params, rows[2:])
    advance(ClipSGD(twins, 0.1, backend=backend, **storage), twins, rows[2:])
    assert_same_bits(params, twins)


@every_backend
@every_storage
def test_a_skipped_first_step_leaves_nothing(storage: dict[str, Any], backend: str) -> None:
    params = half([(40,)])
    optimizer = AdamW(params, 0.01, nonfinite="skip", backend=backend, **storage)
    before = snapshot(optimizer)
    params[0].grad = torch.full_like(params[0], float("nan"))
    optimizer.step()
    assert_unchanged(optimizer, before)


@every_backend
@pytest.mark.parametrize("how", ["dtype", "shape", "alias"])
def test_a_companion_that_cannot_be_is_refused(how: str, backend: str) -> None:
    params = half([(30,), (30,)])
    rows = record_grads(params, 2)
    optimizer = AdamW(params, 0.01, backend=backend, **MASTER)
    advance(optimizer, params, rows[:1])
    state = optimizer.state[params[0]]
    held = state["master_param"]
    state["master_param"], message = {
        "dtype": (held.double(), r"'master_param'.* has dtype .*float64, expected .*float32"),
        "shape": (held[:-1].clone(), "'master_param'.* does not have the parameter's shape"),
        "alias": (optimizer.state[params[1]]["master_param"], "share memory"),
    }[how]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        advance(optimizer, params, rows[1:])
    assert_unchanged(optimizer, before)


# ---- refused ------------------------------------------------------------------------------------


@every_entry
def test_refused_by_every_optimizer(entry: Entry) -> None:
    for kwargs, dtype, error, message in (
        ({**MASTER, **KAHAN}, torch.bfloat16, ValueError, "at most one of master_weights, kahan"),
        ({"kahan": 1}, torch.bfloat16, TypeError, "kahan must be True or False; got 1"),
        (MASTER, torch.complex64, ValueError, "master_weights=True does not go with complex"),
        (NOISY, torch.float16, ValueError, "stochastic_rounding=True does not go with torch.float"),
    ):
        with pytest.raises(error, match=message):
            entry.build(half([(3,)], dtype), "auto", **kwargs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'masterweights'"):
        entry.build(half([(3,)]), "auto", masterweights=True)


def test_a_group_is_refused_and_nothing_changes() -> None:
    optimizer = ClipSGD(half([(3,)]), 0.1, **MASTER)
    with pytest.raises(ValueError, match="at most one of"):
        optimizer.add_param_group({"params": half([(4,)]), "kahan": True})
    saved = optimizer.state_dict()
    saved["param_groups"][0]["stochastic_rounding"] = True
    with pytest.raises(ValueError, match="at most one of"):
        optimizer.load_state_dict(saved)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["stochastic_rounding"] is False
