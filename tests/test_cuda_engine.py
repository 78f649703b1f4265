"""The CUDA engine and its bindings, without a GPU: CPU tensors are its device memory.

Kernels run in the emulation, below a stub of the CUDA runtime that counts calls (tests/simt). What
all backends have in common, tests/test_battery.py and others check in the same way.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from battery import (
    CUDA_EMULATED,
    assert_same_bits,
    assert_same_snapshot,
    every_unwaiting_entry,
    every_variant,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from cuda_late import Capture, NoReads, on_a_late_device  # noqa: F401 - a fixture
from registry import Entry, Kwargs
from simt import emulated
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import AdamW, BackendError, ClipSGD, NonFiniteGradientError, _cpu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not CUDA_EMULATED, reason="PYSMOOTH_EMULATED=1 is not set"),
]


@every_variant
def test_the_cpu_backends_bits(entry: Entry, kwargs: Kwargs, single: bool) -> None:
    """Parameters, states and norms, though gradients come and go."""
    ours, theirs = make_params(), make_params()
    rows: list[list[Any]] = [list(row) for row in record_grads(ours, 4)]
    rows[1][4] = rows[2][0] = None
    results = []
    for backend, params in (("cuda", ours), ("cpu", theirs)):
        optimizer = entry.make(params, backend=backend, **kwargs)
        norms = []
        for row in rows:
            set_grads(params, row)
            optimizer.step()
            norms.append(optimizer.last_norm())  # type: ignore[attr-defined]
        results.append((snapshot(optimizer), norms))
    (a, norms_a), (b, norms_b) = results
    assert_same_snapshot(a, b)
    for x, y in zip(norms_a, norms_b, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def test_tensors_with_and_without_python_objects() -> None:
    module = emulated.module()
    assert module.uses_direct()
    results = []
    for direct in (True, False):
        module.set_direct_enabled(direct)
        try:
            params = make_params()
            optimizer = AdamW(params, 0.1, max_norm=1.0, backend="cuda")
            for row in record_grads(params, 3):
                set_grads(params, row)
                optimizer.step()
            assert all(p._version >= 3 for p in params if p.numel() > 0)
            results.append((snapshot(optimizer), [p._version for p in params]))
        finally:
            module.set_direct_enabled(True)
    assert_same_snapshot(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_rules_are_the_cpu_backends() -> None:
    ours = {rule["name"]: rule for rule in emulated.module().rules()}
    published = {rule["name"]: rule for rule in _cpu.rules()}
    assert set(published) == set(ours)
    for name, rule in ours.items():
        for key in ("hyper", "states", "counts_steps", "accumulates"):
            assert rule[key] == published[name][key], name  # type: ignore[literal-required]


# ---- host calls ----------------------------------------------------------------------------------

# One after the other; and where all of them but those beyond `put, reduce, prepare, apply` can be
# one.
LAUNCHES: list[tuple[Any, Kwargs, int, int]] = [
    # put, reduce, prepare, apply
    (ClipSGD, {"max_norm": 1.0, "momentum": 0.9}, 4, 1),
    (AdamW, {"max_norm": 1.0, "nonfinite": "skip"}, 4, 1),
    # norms of rows, and coefficients of these
    (ClipSGD, {"clip": "agc", "momentum": 0.9}, 6, 6),
    # no norm
    (ClipSGD, {"momentum": 0.9}, 3, 1),
    # one pass more, with a prepare of its own
    (pysmooth.EFSGD, {"compressor": pysmooth.ScaledSign()}, 6, 6),
    # a sample, its filter, digits of the threshold, the selected ones
    (pysmooth.EFSGD, {"compressor": pysmooth.TopK(ratio=0.01)}, 14, 14),
]


@pytest.fixture(params=[False, True], ids=["launches", "single"])
def single(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether steps are one launch where they can be."""
    emulated.module().set_single_launch(request.param)
    yield request.param
    emulated.module().set_single_launch(None)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(("make", "kwargs", "several", "one"), LAUNCHES)
@pytest.mark.parametrize("count", [1, 40])
def test_a_step_launches_and_waits_for_nothing(
    make: Any, kwargs: Kwargs, several: int, one: int, count: int, single: bool
) -> None:
    """However many tensors: so many launches, no copy, no wait. Gradients are new every time."""
    params = make_params([(5003,), (7, 5)] * count)
    optimizer = make(params, lr=0.1, backend="cuda", **kwargs)
    rows = record_grads(params, 3)
    set_grads(params, rows[0])
    optimizer.step()
    launches = one if single else several
    for row in rows[1:]:
        set_grads(params, row)
        before = emulated.calls()
        with NoReads():
            optimizer.step()
        assert emulated.calls() == before._replace(launches=before.launches + launches)


def test_all_gradient_addresses_fit(single: bool) -> None:
    """More of them than one launch can carry."""
    params = [Parameter(torch.full((3,), float(i))) for i in range(9000)]
    optimizer = ClipSGD(params, lr=1.0, backend="cuda")
    for _ in range(2):
        for p in params:
            p.grad = p.detach().clone()
        before = emulated.calls()
        optimizer.step()
    assert emulated.calls().launches == before.launches + (4 if single else 5)  # three puts
    assert all(not p.any() for p in params)


def test_a_plan_is_made_again_when_something_moved() -> None:
    params, twins = make_params(), make_params()
    ours = AdamW(params, lr=0.1, max_norm=1.0, backend="cuda")
    theirs = AdamW(twins, lr=0.1, max_norm=1.0, backend="cpu")

    def step() -> int:
        rows = record_grads(params, 1)
        set_grads(params, rows[0])
        set_grads(twins, rows[0])
        before = emulated.calls()
        ours.step()
        theirs.step()
        return emulated.calls().uploads - before.uploads

    assert step() == 1
    assert step() == 0
    for optimizer in (ours, theirs):
        p = optimizer.param_groups[0]["params"][0]
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()
        p.data = p.detach().clone()
    assert step() == 1
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["max_norm"] = 0.5  # a number alone
    assert step() == 0
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(optimizer.state_dict())
    assert step() == 1
    for optimizer, kept in ((ours, params), (theirs, twins)):
        kept.append(Parameter(torch.ones(3)))
        optimizer.add_param_group({"params": [kept[-1]], "lr": 0.5})
    assert step() == 1
    assert_same_snapshot(snapshot(ours), snapshot(theirs))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (ClipSGD, {"max_norm": 1.0, "momentum": 0.9}),
        (pysmooth.EF21, {"compressor": pysmooth.TopK(k=3), "init": "full"}),
    ],
)
def test_no_gradient_outlives_zero_grad(make: Any, kwargs: Kwargs, direct: bool) -> None:
    """Nor those that a plan was made for; without Python objects of their own, or with them."""
    params = make_params([(1000,), (7, 5), (3,)])
    optimizer = make(params, lr=0.1, backend="cuda", **kwargs)
    emulated.module().set_direct_enabled(direct)
    gc.disable()
    try:
        for _ in range(3):
            memory = []
            for p in params:
                values = np.ones(p.shape, dtype=np.float32)
                memory.append(weakref.ref(values))
                p.grad = torch.from_numpy(values)
                del values
            optimizer.step()
            assert all(seen() is not None for seen in memory)
            optimizer.zero_grad(set_to_none=True)
            assert not any(seen() is not None for seen in memory)
    finally:
        gc.enable()
        emulated.module().set_direct_enabled(True)


# ---- what the host learns late -------------------------------------------------------------------


@pytest.mark.usefixtures("late")
def test_skipped_steps_are_counted_and_their_states_forgotten() -> None:
    params, twins = make_params(), make_params()
    optimizer = ClipSGD(params, 0.1, momentum=0.9, nonfinite="skip", backend="cuda")
    twin = ClipSGD(twins, 0.1, momentum=0.9, nonfinite="skip", backend="cpu")
    rows = record_grads(params, 4)
    bad = [row.clone() for row in rows[0]]
    bad[4][77] = float("nan")
    for row in (bad, bad, rows[1], bad, rows[2]):
        for o, kept in ((optimizer, params), (twin, twins)):
            set_grads(kept, row)
            o.step()
    assert optimizer.skipped_steps() == twin.skipped_steps() == 3
    assert_same_snapshot(snapshot(optimizer), snapshot(twin))
    fresh = ClipSGD(make_params(), 0.1, momentum=0.9, nonfinite="skip", backend="cuda")
    set_grads(fresh.param_groups[0]["params"], bad)
    fresh.step()
    assert fresh.state  # nobody asked yet
    assert fresh.skipped_steps() == 1
    assert not fresh.state


@pytest.mark.usefixtures("late")
def test_raise_names_the_parameters_at_the_next_read() -> None:
    params = make_params([(5,), (6000,), (7,)])
    named = list(zip("abc", params, strict=True))
    optimizer = ClipSGD(named, 0.1, nonfinite="raise", backend="cuda")
    start = [p.detach().clone() for p in params]
    for bad in (2, 1):
        set_grads(params, record_grads(params, 1)[0])
        grad = params[bad].grad
        assert grad is not None
        grad[3] = float("inf")
        optimizer.step()
    assert_same_bits(params, start)
    with pytest.raises(NonFiniteGradientError, match=r"non-finite gradient in 'b', 'c'$"):
        optimizer.state_dict()
    set_grads(params, record_grads(params, 1)[0])
    optimizer.step()
    optimizer.state_dict()  # told once
    assert not torch.equal(params[0], start[0])


@pytest.mark.usefixtures("late")
def test_an_overflow_of_the_loss_scale_is_nobodys_error() -> None:
    params = make_params([(50,)])
    optimizer = ClipSGD(params, 0.1, nonfinite="raise", backend="cuda")
    set_grads(params, [torch.full((50,), float("inf"))])
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert_same_bits(params, make_params([(50,)]))


@pytest.mark.usefixtures("late")
def test_an_estimate_that_starts_as_the_gradient_takes_no_bad_one() -> None:
    params = make_params([(50,), (7,)])
    make = {"compressor": pysmooth.TopK(k=3), "init": "full", "backend": "cuda"}
    optimizer = pysmooth.EF21(params, 0.1, **make)  # type: ignore[arg-type]
    row = record_grads(params, 1)[0]
    set_grads(params, [torch.full((50,), float("nan")), row[1]])
    optimizer.step()
    set_grads(params, row)
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    for p, g in zip(params, row, strict=True):
        torch.testing.assert_close(optimizer.state[p]["grad_estimate"], g.float())


# ---- graphs --------------------------------------------------------------------------------------


def test_replays_and_other_steps_do_not_disturb_each_other(single: bool) -> None:
    """A graph keeps its gradients' addresses and its numbers, whatever steps come between."""
    params, twins = make_params(), make_params()
    ours = AdamW(params, lr=0.1, max_norm=1.0, backend="cuda")
    theirs = AdamW(twins, lr=0.1, max_norm=1.0, backend="cpu")
    rows = record_grads(params, 6)

    def step(row: list[Tensor], lr: float, replay: Capture | None = None) -> None:
        theirs.param_groups[0]["lr"] = lr
        set_grads(twins, row)
        theirs.step()
        if replay is not None:
            for held, value in zip(static, row, strict=True):
                held.copy_(value)
            replay.replay()
            return
        ours.param_groups[0]["lr"] = lr
        set_grads(params, row)
        ours.step()

    step(rows[0], 0.1)
    static = [torch.empty_like(p) for p in params]
    for p, g in zip(params, static, strict=True):
        p.grad = g
    with Capture() as graph:
        ours.param_groups[0]["lr"] = 0.3
        ours.step()
    assert emulated.kernels().runtime_stream() == 7
    step(rows[1], 0.3, graph)
    step(rows[2], 0.05)
    step(rows[3], 0.3, graph)
    step(rows[4], 0.2)
    step(rows[5], 0.3, graph)
    assert_same_snapshot(snapshot(ours), snapshot(theirs))


@pytest.mark.usefixtures("late")
@every_unwaiting_entry
def test_a_learning_rate_on_the_device_is_read_there(entry: Entry, single: bool) -> None:
    """Nobody waits to know it, and a replay finds what is there by then."""
    params, twins = make_params(), make_params()
    lr = torch.tensor(0.1)
    ours, theirs = entry.build(params, "cuda"), entry.build(twins, "cpu")
    ours.param_groups[0]["lr"] = lr
    rows = record_grads(params, 5)
    graph = Capture()
    for i, row in enumerate(rows):
        lr.fill_(0.1 / (i + 1))
        theirs.param_groups[0]["lr"] = float(lr)
        set_grads(twins, row)
        theirs.step()
        if i == 2:
            with graph:
                ours.step()
        if i < 2:
            set_grads(params, row)
            with NoReads() if i else nullcontext():
                ours.step()
        else:
            for p, value in zip(params, row, strict=True):
                assert p.grad is not None
                p.grad.copy_(value)
            graph.replay()
    assert_same_snapshot(snapshot(ours), snapshot(theirs))


@pytest.mark.usefixtures("late")
def test_a_learning_rate_that_kernels_cannot_read_is_refused() -> None:
    params = make_params()
    optimizer = AdamW(params, lr=torch.tensor(0.1, dtype=torch.bfloat16), backend="cuda")
    set_grads(params, record_grads(params, 1)[0])
    with pytest.raises(ValueError, match=r"lr is a torch.bfloat16 tensor on cpu"):
        optimizer.step()
    assert not optimizer.state
    assert_same_bits(params, make_params())


def test_capturable_asks_for_a_backend_whose_steps_can_be() -> None:
    AdamW(make_params(), capturable=True, backend="cuda")
    with pytest.raises(ValueError, match="steps of backend 'cpu' cannot be captured"):
        AdamW(make_params(), capturable=True)


def test_a_graphs_memory_outlives_its_plan() -> None:
    params = make_params()
    optimizer = ClipSGD(params, 0.1, max_norm=1.0, backend="cuda")
    set_grads(params, record_grads(params, 1)[0])
    optimizer.step()
    with Capture() as graph:
        optimizer.step()
    held = [p.detach().clone() for p in params]
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))]})
    optimizer.step()  # another plan
    for p, value in zip(params, held, strict=True):
        p.data.copy_(value)
    graph.replay()
    once = [p.detach().clone() for p in params]
    for p, value in zip(params, held, strict=True):
        p.data.copy_(value)
    optimizer.step()
    assert_same_bits(once, [p.detach() for p in params])


def test_a_capture_needs_a_step_before_it() -> None:
    params = make_params()
    optimizer = ClipSGD(params, 0.1, momentum=0.9, backend="cuda")
    set_grads(params, record_grads(params, 1)[0])
    with Capture(), pytest.raises(BackendError, match="run the same step once before"):
        optimizer.step()
    assert not optimizer.state


# ---- when a step is one launch -------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[Any]:
    """Sets what the device says of itself: multiprocessors, blocks of each, L2 cache, flag."""
    yield emulated.kernels().runtime_device
    emulated.kernels().runtime_device(132, 1, 50 << 20, 1)


def launches_of_a_step(params: list[Parameter]) -> int:
    optimizer = AdamW(params, 0.1, max_norm=1.0, backend="cuda")
    before = 0
    for row in record_grads(params, 2):
        set_grads(params, row)
        before = emulated.calls().launches
        optimizer.step()
    return emulated.calls().launches - before


def test_a_step_is_one_launch_where_it_fits_in_the_cache(device: Any) -> None:
    params = make_params([(1000,), (24,)])
    needs = 1024 * 4 * 4  # parameter, gradient, two states
    for cache, launches in ((needs, 1), (needs - 1, 4)):
        device(132, 1, cache, 1)
        assert launches_of_a_step(params) == launches
    emulated.module().set_single_launch(True)
    try:
        assert launches_of_a_step(params) == 1
        device(132, 1, 1 << 20, 0)  # it takes no cooperative launches
        assert launches_of_a_step(params) == 4
    finally:
        emulated.module().set_single_launch(None)


def test_as_many_blocks_as_are_on_the_device_at_the_same_time(device: Any) -> None:
    """One that holds two blocks gets two: CUDA refuses more. Its neighbours stay as they were."""
    shapes = [(5003,)] * 7
    for multiprocessors, resident in ((1, 2), (2, 1), (1, 1)):
        device(multiprocessors, resident, 50 << 20, 1)
        params, twins = make_params(shapes), make_params(shapes)
        assert launches_of_a_step(params) == 1
        optimizer = AdamW(twins, 0.1, max_norm=1.0, backend="cpu")
        for row in record_grads(twins, 2):
            set_grads(twins, row)
            optimizer.step()
        assert_same_bits(params, twins)
    assert emulated.kernels().runtime_current_device() == 0


# ---- choice --------------------------------------------------------------------------------------


@pytest.fixture
def for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.take_cpu_tensors(monkeypatch)


@pytest.mark.usefixtures("for_cpu")
def test_auto_takes_it_for_everything() -> None:
    assert ClipSGD(make_params(), 0.1).resolved_backend == "cuda"
    assert ClipSGD(make_params(), 0.1, clip="agc").resolved_backend == "cuda"
    top_k: Any = {"compressor": pysmooth.TopK(k=3), "backend": "auto"}
    assert pysmooth.EFSGD(make_params(), 0.1, **top_k).resolved_backend == "cuda"
    assert pysmooth.EFSGD(make_params(), 0.1, absorb=True, **top_k).resolved_backend == "cuda"
    assert pysmooth.EF21Plus(make_params(), 0.1, **top_k).resolved_backend == "cuda"
    blocks: Any = {"compressor": pysmooth.QSGD(4, scope="block"), "backend": "auto"}
    assert pysmooth.EF21(make_params(), 0.1, **blocks).resolved_backend == "cuda"
