"""What may go wrong around an optimizer: a step, or a load, then happens whole or not at all."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from battery import (
    Snapshot,
    advance,
    all_params,
    assert_same_bits,
    assert_unchanged,
    continues_alike,
    every_backend,
    every_entry,
    make_params,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
)
from registry import REGISTRY, Entry
from torch import Tensor

import pysmooth
from pysmooth import NonFiniteGradientError
from pysmooth.engine import state as state_module

SHAPES = ((5, 3), (), (0, 2), (33,))


def equal(a: Snapshot, b: Snapshot) -> bool:
    try:
        for x, y in zip(a[0], b[0], strict=True):
            assert same_bits(x, y)
        for s, t in zip(a[1], b[1], strict=True):
            assert s.keys() == t.keys()
            for key, value in s.items():
                same = same_bits(value, t[key]) if isinstance(value, Tensor) else value == t[key]
                assert same
    except AssertionError:
        return False
    return True


# ---- interrupted ---------------------------------------------------------------------------------


def interrupt_at(line: int, run: Callable[[], Any]) -> bool:
    """Runs, with Ctrl-C pressed at the n-th line of pysmooth's code; whether it came to that."""
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if "/pysmooth/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.many_steps
@pytest.mark.parametrize("started", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", ["clip_sgd", "m_adagrad_norm", "ef_sgd"])
def test_interrupt_on_any_line_of_a_step(name: str, started: bool) -> None:
    """Nothing of the step happened, or all of it; then training goes on as if nothing had been."""
    entry = next(e for e in REGISTRY if e.name == name)
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    origin = entry.build(params, "cpu")
    advance(origin, params, rows[:1] if started else [])
    whole = copy.deepcopy(origin)
    advance(whole, all_params(whole), rows[1:2])
    want = snapshot(whole)
    line = 0
    outcomes = set()
    while True:
        line += 1
        optimizer = copy.deepcopy(origin)
        if started:  # with a plan
            advance(optimizer, all_params(optimizer), [[None] * len(params)])
        set_grads(all_params(optimizer), rows[1])
        before = snapshot(optimizer)
        interrupted = interrupt_at(line, optimizer.step)
        # A tracer can raise where a `with` is left and its exit not called yet; Ctrl-C comes later.
        torch.set_grad_enabled(True)
        after = snapshot(optimizer)
        assert equal(after, before) or equal(after, want), f"line {line}"
        outcomes.add((interrupted, equal(after, want)))
        if not equal(after, want):
            optimizer.step()
        assert equal(snapshot(optimizer), want), f"after line {line}"
        advance(optimizer, all_params(optimizer), rows[2:])
        if not interrupted:
            break
    assert {(True, False), (False, True)} <= outcomes


@every_backend
@every_entry
def test_exceptions_in_closures_and_hooks_change_nothing(entry: Entry, backend: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    optimizer, other = entry.build(params, backend), entry.build(make_params(SHAPES), backend)
    for row in rows[:2]:
        set_grads(params, row)
        before = snapshot(optimizer)

        def refuse(*_: object) -> float:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            optimizer.step(refuse)
        handle = optimizer.register_step_pre_hook(refuse)  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        handle.remove()
        assert_unchanged(optimizer, before)
        optimizer.step()
        advance(other, all_params(other), [row])
    continues_alike(optimizer, other, rows[2:])


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Memory for so many allocations of states; -1: enough."""
    left = [-1]

    def meter(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if left[0] == 0:
                raise RuntimeError("not enough memory: you tried to allocate")
            left[0] -= left[0] > 0
            return make(*args, **kwargs)

        return made

    class Torch:
        empty, zeros = staticmethod(meter(torch.empty)), staticmethod(meter(torch.zeros))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(state_module, "torch", Torch())
    yield left
    left[0] = -1


@pytest.mark.parametrize("backend", ["cpu"])
@every_entry
def test_out_of_memory_for_states(entry: Entry, backend: str, scarce: list[int]) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 2)
    optimizer, other = entry.build(params, backend), entry.build(make_params(SHAPES), backend)
    before = snapshot(optimizer)
    set_grads(params, rows[0])
    failed = 0
    for scarce[0] in range(9):
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "memory" in str(error)  # noqa: PT017
            failed += 1
            assert_unchanged(optimizer, before)
            continue
        break
    assert failed > 0 or not entry.state_keys(entry.main)
    scarce[0] = -1
    advance(other, all_params(other), rows[:1])
    continues_alike(optimizer, other, rows[1:])


@every_backend
@every_entry
def test_out_of_memory_in_a_load(entry: Entry, backend: str, scarce: list[int]) -> None:
    params = make_params(SHAPES)
    optimizer = entry.build(params, backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    saved = copy.deepcopy(optimizer.state_dict())
    advance(optimizer, params, rows[1:])
    before = snapshot(optimizer)
    if not any(before[1]):
        pytest.skip("no states")
    scarce[0] = 0
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


# ---- checkpoints ---------------------------------------------------------------------------------


def drop(saved: Any, *path: Any) -> None:
    for key in path[:-1]:
        saved = saved[key]
    del saved[path[-1]]


def put(value: Any, saved: Any, *path: Any) -> None:
    for key in path[:-1]:
        saved = saved[key]
    saved[path[-1]] = value


BROKEN: dict[str, Callable[[Any], None]] = {
    "no state": lambda saved: drop(saved, "state"),
    "no groups": lambda saved: drop(saved, "param_groups"),
    "no params": lambda saved: drop(saved, "param_groups", 0, "params"),
    "groups of nothing": lambda saved: put([None], saved, "param_groups"),
    "groups of tensors": lambda saved: put(torch.zeros(2, 2), saved, "param_groups"),
    "params of names": lambda saved: put(["a", "b", "c", "d"], saved, "param_groups", 0, "params"),
    "a parameter twice": lambda saved: put(0, saved, "param_groups", 0, "params", 1),
    "state of nothing": lambda saved: put(None, saved, "state", 0),
    "lr of nothing": lambda saved: put(None, saved, "param_groups", 0, "lr"),
    "lr of NaN": lambda saved: put(float("nan"), saved, "param_groups", 0, "lr"),
}


@every_backend
@every_entry
@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoint_is_refused_whole(entry: Entry, backend: str, how: str) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 4)
    optimizer = entry.build(params, backend)
    if how.startswith("lr") and "lr" not in optimizer.param_groups[0]:
        pytest.skip("no lr")
    advance(optimizer, params, rows[:2])
    other = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    if how in ("state of nothing", "params of names") and not saved["state"]:
        pytest.skip("no states")
    BROKEN[how](saved)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(saved)
    continues_alike(optimizer, other, rows[2:])


@every_backend
@every_entry
@pytest.mark.parametrize("count", [float("nan"), -1.0, float("inf"), torch.tensor(float("nan"))])
def test_step_counts_that_count_nothing(entry: Entry, backend: str, count: Any) -> None:
    params = make_params(SHAPES)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, record_grads(params, 1))
    saved = copy.deepcopy(optimizer.state_dict())
    if "step" not in saved["state"].get(0, {}):
        pytest.skip("counts no steps")
    saved["state"][0]["step"] = count
    with pytest.raises(ValueError, match=r"step.*not a count of steps"):
        optimizer.load_state_dict(saved)


def test_truncated_files_are_refused_by_torch_before_anything_changes() -> None:
    """pysmooth opens no files: what torch.load makes of one is all that it sees."""
    params = make_params(SHAPES)
    optimizer = pysmooth.Adam(params, lr=0.1)
    advance(optimizer, params, record_grads(params, 1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    before = snapshot(optimizer)
    size = len(file.getvalue())
    for cut in range(0, size, size // 7):
        with pytest.raises((RuntimeError, EOFError)):
            torch.load(io.BytesIO(file.getvalue()[:cut]), weights_only=True)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("norm", ["in_step", "in_backward"])
def test_checkpoint_of_a_torch_twin_lacks_what_torch_lacks(norm: Any) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 2)
    twin = torch.optim.AdamW(params, lr=0.5)
    advance(twin, params, rows[:1])
    saved = twin.state_dict()
    for key in ("decoupled_weight_decay", "lr"):
        saved["param_groups"][0].pop(key, None)
    mine = make_params(SHAPES)
    optimizer = pysmooth.AdamW(mine, lr=0.25, max_norm=1.0, norm=norm)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    advance(optimizer, mine, rows[1:])


# ---- hyper-parameters and gradients --------------------------------------------------------------


@every_backend
@every_entry
def test_nan_put_into_a_group_is_named_before_it_gets_into_states(
    entry: Entry, backend: str
) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 3)
    optimizer = entry.build(params, backend)
    advance(optimizer, params, rows[:1])
    for key in ("lr", "weight_decay", "max_norm"):
        good = optimizer.param_groups[0].get(key)
        if not isinstance(good, float):
            continue
        if key == "lr" and optimizer.param_groups[0].get("smoothness") is not None:
            continue
        before = snapshot(optimizer)
        optimizer.param_groups[0][key] = float("nan")
        set_grads(params, rows[1])
        with pytest.raises(ValueError, match=key):
            optimizer.step()
        assert_unchanged(optimizer, before)
        optimizer.param_groups[0][key] = good
    advance(optimizer, params, rows[1:])


@every_backend
@every_entry
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_policy_zero_keeps_every_state_finite(entry: Entry, backend: str, value: float) -> None:
    """Also one that starts as the gradient."""
    (p,) = make_params([(40,)])
    try:
        optimizer = entry.build([p], backend, nonfinite="zero")
    except ValueError:
        pytest.skip("does not take 'zero'")
    for row in record_grads([p], 3):
        set_grads([p], row)
        p.grad[3] = value
        optimizer.step()
        assert p.isfinite().all()
        for key, state in optimizer.state[p].items():
            assert torch.as_tensor(state).isfinite().all(), key


@every_backend
@pytest.mark.parametrize("init", ["compressed", "full"])
def test_sparse_gradient_where_states_start_as_gradients(backend: str, init: Any) -> None:
    compressor = pysmooth.compressors.TopK(k=2)
    (p,) = make_params([(6, 2)])
    optimizer = pysmooth.EF21([p], 0.1, compressor, init=init, eta=0.5, backend=backend)
    before = snapshot(optimizer)
    p.grad = torch.ones(6, 2).to_sparse()
    with pytest.raises(ValueError, match="only dense"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_backend
def test_momentum_given_to_an_optimizer_that_absorbs(backend: str) -> None:
    if backend not in ("cpu", "eager"):
        pytest.skip("absorb=True is for these")
    (p,) = make_params([(6,)])
    compressor = pysmooth.compressors.TopK(k=2)
    optimizer = pysmooth.EFSGD([p], 0.1, compressor, absorb=True, backend=backend)
    optimizer.param_groups[0]["momentum"] = 0.5
    p.grad = torch.ones(6)
    with pytest.raises(ValueError, match="absorb=True does not go with momentum"):
        optimizer.step()


@every_backend
@every_entry
def test_requires_grad_toggled(entry: Entry, backend: str) -> None:
    """A frozen parameter that keeps no gradient rests; thawed, it goes on where it was."""
    present = (True, False, False, True)
    params, expected = make_params([(5,), (40,)]), make_params([(5,), (40,)])
    rows = record_grads(params, len(present))
    optimizer = entry.build(entry.apart(params), backend, **entry.tensors)
    for row, here in zip(rows, present, strict=True):
        params[0].requires_grad_(here)
        set_grads(params, [row[0] if here else None, row[1]])
        optimizer.step()
    for i, p in enumerate(expected):
        own = [[row[i]] for row, here in zip(rows, present, strict=True) if here or i]
        advance(entry.build([p], backend, **entry.tensors), [p], own)
    assert_same_bits(params, expected)


# ---- large --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """Four GiB of bfloat16; the last element is reached, and by its own index."""
    p = torch.nn.Parameter(torch.ones(2**31 + 3, dtype=torch.bfloat16))
    p.grad = torch.tensor([0.5], dtype=torch.bfloat16).expand(p.shape)
    pysmooth.ClipSGD([p], lr=0.5, backend="cpu").step()
    for part in p.detach().split(2**28):
        assert bool((part == 0.75).all())
    p.grad = p.detach()  # in linear memory
    pysmooth.ClipSGD([p], lr=0.5, backend="cpu").step()
    for part in p.detach().split(2**28):
        assert bool((part == 0.375).all())


@pytest.mark.slow
def test_norm_of_a_billion_elements() -> None:
    """Against the exact sum; the bound is that of tests/test_norm_edges.py, at any length."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(3))
    exact = math.fsum(x * x for x in block.tolist())
    for count in (1, 1000):
        got = float(pysmooth.get_total_norm([block.expand(count, -1)]))
        assert got == pytest.approx(math.sqrt(exact * count), rel=127 * 2**-24, abs=0)


# ---- shared parameters ---------------------------------------------------------------------------


@every_backend
@every_entry
def test_parameter_in_two_groups_is_refused(entry: Entry, backend: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer = entry.build(params, backend)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)


@every_backend
@every_entry
def test_parameter_of_two_optimizers(entry: Entry, backend: str) -> None:
    """Each keeps states of its own: turns are turns."""
    params, expected = make_params([(5,), (7,)]), make_params([(5,), (7,)])
    rows = record_grads(params, 4)
    first, second = (entry.build(params, backend) for _ in range(2))
    mirror = [entry.build(expected, "eager") for _ in range(2)]
    for i, row in enumerate(rows):
        advance((first, second)[i % 2], params, [row])
        advance(mirror[i % 2], expected, [row])
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


# ---- processes -----------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


SETUP = """
import torch, pysmooth
torch.manual_seed(0)
model = torch.nn.Linear(300, 200)
TopK = pysmooth.compressors.TopK
optimizers = [
    pysmooth.Adam(model.parameters(), max_norm=1.0, norm="in_backward"),
    pysmooth.EFSGD(model.parameters(), 0.1, TopK(ratio=0.1)),
    pysmooth.ClipSGD(model.parameters(), 0.1, momentum=0.9, max_norm=1.0),
]
def steps():
    for optimizer in optimizers:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(8, 300)).square().sum().backward()
            optimizer.step()
"""


@pytest.mark.parametrize("end", ["", "import sys; sys.exit()", "optimizers.append(optimizers)"])
def test_interpreter_ends_with_live_optimizers(end: str) -> None:
    """Also in reference cycles, and with hooks on parameters."""
    run(SETUP + "steps()\n" + end)


def test_spawned_process_goes_on_with_the_same_bits(tmp_path: Any) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 4)
    optimizer = pysmooth.Adam(params, lr=0.1, max_norm=1.0)
    advance(optimizer, params, rows[:2])
    file = tmp_path / "handed"
    torch.save((optimizer, rows[2:]), file)
    run(
        f"import torch\noptimizer, rows = torch.load({str(file)!r}, weights_only=False)\n"
        "params = optimizer.param_groups[0]['params']\n"
        "for row in rows:\n"
        "    for p, g in zip(params, row): p.grad = g.to(p.dtype)\n"
        "    optimizer.step()\n"
        f"torch.save([p.detach() for p in params], {str(file)!r})"
    )
    advance(optimizer, params, rows[2:])
    assert_same_bits(params, torch.load(file))


def test_non_finite_error_is_no_other() -> None:
    """A RuntimeError, so that those who catch torch's go on catching."""
    assert issubclass(NonFiniteGradientError, RuntimeError)
