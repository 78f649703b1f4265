"""Parameters on several GPUs, emulated: the engine's side. Kernels: test_cuda_kernels_devices.py.

All tensors are CPU tensors; which device one of them lies on, a table says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from battery import (
    CUDA_EMULATED,
    advance,
    all_params,
    assert_same_bits,
    assert_same_snapshot,
    every_variant,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from cuda_late import Capture, on_a_late_device  # noqa: F401 - a fixture
from registry import Entry, Kwargs
from simt import emulated
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import pysmooth
from pysmooth import EFSGD, AdamW, BackendError, ClipSGD, NonFiniteGradientError, TopK
from pysmooth.engine import cuda, cuda_clip, cuda_memory

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not CUDA_EMULATED, reason="PYSMOOTH_EMULATED=1 is not set"),
]

Spread = Callable[..., Sequence[Tensor]]


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Spread:
    """Puts tensors on devices by turns, or where it is told; a stream for each device."""
    places: dict[int, int] = {}
    kept: list[Tensor] = []  # an id belongs to one tensor as long as that lives

    def put(tensors: Sequence[Tensor], where: Sequence[int] = (0, 1, 2)) -> Sequence[Tensor]:
        kept.extend(tensors)
        places.update({id(t): where[i % len(where)] for i, t in enumerate(tensors)})
        return tensors

    monkeypatch.setattr(cuda_memory, "home", lambda t: torch.device("cpu", places.get(id(t), 0)))
    monkeypatch.setattr(cuda_memory, "stream_of", lambda device: (stream(device.index), False))
    return put


def stream(index: int | None) -> int:
    return 100 + (index or 0)


def launches_on(index: int) -> int:
    return int(emulated.kernels().runtime_launches_on(stream(index)))


class Copies(TorchDispatchMode):
    """Nothing waits for a device, and whatever is copied between devices is copied on streams."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name
        if name == "aten::copy_":
            assert args[2:] == (True,)  # non_blocking
            self.made += 1
        if name == "aten::_to_copy" and "device" in (kwargs or {}):
            assert (kwargs or {})["non_blocking"]
        return func(*args, **(kwargs or {}))


def looks_at_all(optimizer: Any) -> bool:
    select = optimizer.select_spec()
    return optimizer.absorbs or (select is not None and select[:2] == cuda.TOP_K_OF_ALL)


@every_variant
def test_the_cpu_backends_bits(entry: Entry, kwargs: Kwargs, spread: Spread) -> None:
    """Whichever parameter lies where, though gradients come and go."""
    ours, theirs = make_params(), make_params()
    spread(ours)
    rows: list[list[Any]] = [list(row) for row in record_grads(ours, 4)]
    rows[1][4] = rows[2][0] = None
    results = []
    for backend, params in (("cuda", ours), ("cpu", theirs)):
        optimizer: Any = entry.make(params, backend=backend, **kwargs)
        norms = []
        for row in rows:
            set_grads(params, row)
            if backend == "cuda" and looks_at_all(optimizer):
                with pytest.raises(BackendError, match=r"of one device; these are on cpu:0, cpu:1"):
                    optimizer.step()
                assert_same_bits(params, make_params())
                return
            optimizer.step()
            norms.append((optimizer.last_norm(), optimizer.last_clip_coef()))
        results.append((snapshot(optimizer), norms))
    (a, norms_a), (b, norms_b) = results
    assert_same_snapshot(a, b)
    for pair in zip(norms_a, norms_b, strict=True):
        for x, y in zip(*pair, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)


CALLS: list[tuple[Any, Kwargs, int, int]] = [
    # put, reduce, what it tells the others; what follows from theirs, prepare, apply
    (ClipSGD, {"max_norm": 1.0, "momentum": 0.9}, 6, 1),
    # put, prepare, apply: nobody asks the others
    (ClipSGD, {"momentum": 0.9}, 3, 0),
    # and a pass, whose sums are of single tensors, with a prepare of its own; or over all
    (pysmooth.EFSGD, {"compressor": pysmooth.ScaledSign()}, 8, 1),
    (pysmooth.EFSGD, {"compressor": pysmooth.ScaledSign(scope="global")}, 10, 2),
]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(("make", "kwargs", "launches", "meetings"), CALLS)
@pytest.mark.parametrize("devices", [2, 3])
def test_launches_and_copies_of_a_step(
    make: Any, kwargs: Kwargs, launches: int, meetings: int, devices: int, spread: Spread
) -> None:
    """On every device as many, on its own stream; a row from each to the first, and all back."""
    params = make_params([(5003,), (7, 5)] * 6)
    spread(params, range(devices))
    optimizer = make(params, lr=0.1, backend="cuda", **kwargs)
    rows = record_grads(params, 3)
    set_grads(params, rows[0])
    optimizer.step()
    for row in rows[1:]:
        set_grads(params, row)
        before = emulated.calls(), [launches_on(d) for d in range(devices)]
        with Copies() as copies:
            optimizer.step()
        assert copies.made == meetings * 2 * (devices - 1)
        assert [launches_on(d) - n for d, n in enumerate(before[1])] == [launches] * devices
        total = before[0].launches + launches * devices
        assert emulated.calls() == before[0]._replace(launches=total)


@pytest.mark.usefixtures("late")
def test_a_skipped_step_is_skipped_everywhere_and_counted_once(spread: Spread) -> None:
    params, twins = make_params(), make_params()
    spread(params)
    ours = AdamW(params, 0.1, max_norm=1.0, nonfinite="skip", backend="cuda")
    theirs = AdamW(twins, 0.1, max_norm=1.0, nonfinite="skip", backend="cpu")
    rows = record_grads(params, 4)
    rows[0][4][77] = rows[2][6][0] = float("nan")
    advance(ours, params, rows)
    advance(theirs, twins, rows)
    assert ours.skipped_steps() == theirs.skipped_steps() == 2
    assert_same_snapshot(snapshot(ours), snapshot(theirs))


@pytest.mark.usefixtures("late")
def test_raise_names_parameters_of_all_devices(spread: Spread) -> None:
    params = make_params([(5,), (6000,), (7,)])
    spread(params)
    optimizer = ClipSGD(zip("abc", params, strict=True), 0.1, nonfinite="raise", backend="cuda")
    row = record_grads(params, 1)[0]
    row[1][7] = row[2][3] = float("inf")
    set_grads(params, row)
    optimizer.step()
    assert_same_bits(params, make_params([(5,), (6000,), (7,)]))
    with pytest.raises(NonFiniteGradientError, match=r"non-finite gradient in 'b', 'c'$"):
        optimizer.state_dict()
    optimizer.state_dict()  # told once


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_what_grad_scaler_sets_is_read_on_every_device(overflow: float, spread: Spread) -> None:
    params, twins = make_params(), make_params()
    spread(params)
    results = []
    for backend, held in (("cuda", params), ("cpu", twins)):
        optimizer: Any = AdamW(held, 0.1, max_norm=1.0, backend=backend)
        for row in record_grads(held, 2):
            set_grads(held, row)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(overflow)
            optimizer.step()
        assert optimizer.skipped_steps() == 0
        results.append([p.detach() for p in held])
    assert_same_bits(*results)


@pytest.mark.usefixtures("late")
def test_a_learning_rate_on_one_device_is_taken_to_the_others(spread: Spread) -> None:
    params, twins = make_params(), make_params()
    spread(params)
    lr = torch.tensor(0.1)
    spread([lr], [1])
    ours = AdamW(params, lr=lr, max_norm=1.0, backend="cuda")
    theirs = AdamW(twins, lr=0.1, max_norm=1.0, backend="cpu")
    for i, row in enumerate(record_grads(params, 3)):
        lr.fill_(0.1 / (i + 1))
        theirs.param_groups[0]["lr"] = float(lr)
        advance(ours, params, [row])
        advance(theirs, twins, [row])
    assert_same_snapshot(snapshot(ours), snapshot(theirs))
    spread([lr], [5])
    set_grads(params, record_grads(params, 1)[0])
    with pytest.raises(ValueError, match=r"parameters' device, cpu:0, cpu:1, cpu:2"):
        ours.step()
    assert_same_snapshot(snapshot(ours), snapshot(theirs))


def test_a_capture_is_refused(spread: Spread) -> None:
    params = make_params()
    spread(params)
    optimizer = AdamW(params, 0.1, max_norm=1.0, backend="cuda")
    advance(optimizer, params, record_grads(params, 1))
    before = snapshot(optimizer)
    calls = emulated.calls()
    with Capture(), pytest.raises(BackendError, match=r"cannot capture.*cpu:0, cpu:1, cpu:2"):
        optimizer.step()
    assert emulated.calls() == calls
    assert_same_snapshot(snapshot(optimizer), before)
    optimizer.step()


def test_what_moved_on_one_device_makes_new_plans_for_all(spread: Spread) -> None:
    params, twins = make_params(), make_params()
    spread(params)
    ours = AdamW(params, 0.1, max_norm=1.0, backend="cuda")
    theirs = AdamW(twins, 0.1, max_norm=1.0, backend="cpu")
    for i, row in enumerate(record_grads(params, 4)):
        before = emulated.calls().uploads
        advance(ours, params, [row])
        advance(theirs, twins, [row])
        assert emulated.calls().uploads - before == (0 if i == 1 else 3)
        if i == 1:
            for optimizer in (ours, theirs):
                p = all_params(optimizer)[4]
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()
        if i == 2:
            for optimizer in (ours, theirs):
                optimizer.load_state_dict(optimizer.state_dict())
    assert_same_snapshot(snapshot(ours), snapshot(theirs))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda p: EFSGD(p, 0.1, TopK(k=3, scope="global"), backend="cuda"),
            r"TopK\(scope='global'",
        ),
        (lambda p: EFSGD(p, 0.1, TopK(k=3), absorb=True, backend="cuda"), "absorb=True"),
    ],
)
def test_what_sees_all_gradients_takes_one_device(
    make: Callable[[Any], Any], what: str, spread: Spread
) -> None:
    params = make_params()
    spread(params)
    optimizer = make(params)
    set_grads(params, record_grads(params, 1)[0])
    with pytest.raises(BackendError, match=rf"^{what}.* takes parameters of one device; .* cpu:1"):
        optimizer.step()
    assert_same_bits(params, make_params())
    assert not optimizer.state


def test_the_triton_backend_takes_one_device() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from pysmooth.engine.triton import TritonEngine

    devices = [torch.device("cuda", i) for i in range(2)]
    with pytest.raises(BackendError, match=r"'triton' takes parameters of one device.*cuda:1$"):
        TritonEngine().check_devices(ClipSGD(make_params(), 0.1), devices)


# ---- clip_grad_norm_ and get_total_norm ----------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_clip, "_PLANS", [])
    emulated.take_cpu_tensors(monkeypatch)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), 0.0])
def test_clipping(norm_type: float, error_if_nonfinite: bool, spread: Spread) -> None:
    """The bits of one device; each device's launches on its stream."""
    shapes = [(7, 5), (33,), (20011,), (0, 3), (3, 2, 3, 3)]
    params, twins = make_params(shapes), make_params(shapes)
    for row in record_grads(params, 2):
        set_grads(params, row)
        set_grads(twins, row)
        grads = spread([p.grad for p in params if p.grad is not None])
        held = [p.grad for p in twins if p.grad is not None]
        cuda_clip._PLANS.clear()  # the table that says where tensors lie is new
        expected = cuda_clip.total_norm(held, norm_type)
        cuda_clip._PLANS.clear()
        before = [launches_on(d) for d in range(3)]
        with Copies() as copies:
            assert torch.equal(cuda_clip.total_norm(list(grads), norm_type), expected)
        assert copies.made == 4
        # put, reduce, what it tells the others; what follows from theirs
        assert [launches_on(d) - n for d, n in enumerate(before)] == [4] * 3
        limit = 0.5 * float(expected)
        norm = pysmooth.clip_grad_norm_(params, limit, norm_type, error_if_nonfinite)
        assert torch.equal(norm, expected)
        cuda_clip._PLANS.clear()
        pysmooth.clip_grad_norm_(twins, limit, norm_type, error_if_nonfinite)
        assert_same_bits(grads, held)
        assert not torch.equal(grads[0].double(), row[0])


@pytest.mark.usefixtures("fresh")
def test_a_norm_that_is_not_finite_leaves_all_devices_alone(spread: Spread) -> None:
    params = [Parameter(torch.ones(5)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(5)
    spread([p.grad for p in params if p.grad is not None])
    params[2].grad[3] = float("nan")  # type: ignore[index]
    with pytest.raises(RuntimeError, match="non-finite"):
        pysmooth.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert all(torch.equal(p.grad, torch.ones(5)) for p in params[:2])  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh")
def test_a_capture_of_clipping_is_refused(spread: Spread) -> None:
    params = [Parameter(torch.ones(5)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(5)
    spread([p.grad for p in params if p.grad is not None])
    pysmooth.clip_grad_norm_(params, 1.0)
    before = [p.grad.clone() for p in params if p.grad is not None]
    with Capture(), pytest.raises(BackendError, match="cannot capture"):
        pysmooth.clip_grad_norm_(params, 1.0)
    assert_same_bits(before, [p.grad for p in params if p.grad is not None])
