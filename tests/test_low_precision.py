"""States in bfloat16, rounded stochastically: the mean, the bits, checkpoints."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from battery import BACKENDS, advance, make_params, record_grads, set_grads
from torch import Tensor

import pysmooth
from pysmooth import Adagrad, Adam, AdamW, _cpu
from pysmooth.reference import round_stochastically

every_backend = pytest.mark.parametrize("backend", BACKENDS)
LOW: dict[str, Any] = {"state_dtype": torch.bfloat16}
MAKES: dict[str, Any] = {
    "adamw": lambda p, **kw: AdamW(p, 0.01, max_norm=1.0, **LOW, **kw),
    "amsgrad": lambda p, **kw: Adam(p, 0.01, amsgrad=True, **LOW, **kw),
    "adagrad": lambda p, **kw: Adagrad(p, 0.1, weight_decay=0.01, **LOW, **kw),
}
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
SHAPES = [(7, 5), (), (33,), (5003,), (1,)]


def bits(params: list[Any], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in params] + [
        value.clone() for p in params for value in optimizer.state[p].values()
    ]


@every_backend
@every_make
def test_dtypes(make: Any, backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = make(params, backend=backend)
    advance(optimizer, params, record_grads(params, 1))
    for key, value in optimizer.state[params[0]].items():
        wide = key in ("step", "max_exp_avg_sq")  # a maximum of noisy numbers would drift up
        assert value.dtype == (torch.float32 if wide else torch.bfloat16)


@every_make
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_with_eager(make: Any, dtype: torch.dtype) -> None:
    """The noise is the same; a sum's last bit can tip a rounding, of few elements."""
    results = []
    for backend in BACKENDS:
        params = make_params(SHAPES, dtype)
        optimizer = make(params, backend=backend)
        advance(optimizer, params, record_grads(params, 3))
        results.append(bits(params, optimizer))
    for x, y in zip(*results, strict=True):
        scale = 1e-3 + float(y.abs().max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=2**-7, atol=2**-7 * scale)
        if x.dtype == torch.bfloat16 and x.numel() > 1000 and dtype == torch.float32:
            assert float((x != y).float().mean()) < 0.01


@every_make
@pytest.mark.parametrize("isa", _cpu.isa_levels())
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_everywhere(make: Any, isa: str, threads: int) -> None:
    """For any vector width, number of threads and layout of the gradient."""
    results = []
    for setting in (None, (isa, threads)):
        params = make_params([*SHAPES, (300, 250)])
        optimizer = make(params, backend="cpu")
        before = _cpu.isa(), torch.get_num_threads()
        try:
            if setting is not None:
                _cpu.set_isa(isa)
                torch.set_num_threads(threads)
            for row in record_grads(params, 3):
                if setting is not None:
                    row[-1] = row[-1].t().contiguous().t()
                set_grads(params, row)
                optimizer.step()
        finally:
            _cpu.set_isa(before[0])
            torch.set_num_threads(before[1])
        results.append(bits(params, optimizer))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_a_view_of_a_larger_tensor_has_the_same_bits() -> None:
    """Strided parameters go another way through the kernel."""
    whole = torch.nn.Parameter(torch.zeros(64, 50))
    results = []
    start = make_params([(64, 37)])[0].detach()
    for p in (start.clone(), whole.detach()[:, :37]):
        p.copy_(start)
        p.requires_grad_()
        optimizer = AdamW([p], 0.01, backend="cpu", **LOW)
        advance(optimizer, [p], record_grads([p], 3))
        results.append(bits([p], optimizer))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@every_backend
def test_the_mean_is_right(backend: str) -> None:
    """0.999 of a bfloat16 number rounds to the number itself: to nearest, nothing would decay."""
    p = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = AdamW([p], 0.0, betas=(0.0, 0.999), backend=backend, **LOW)
    p.grad = torch.full_like(p, math.sqrt(1000.0))
    optimizer.step()
    p.grad = torch.zeros_like(p)
    steps = 40
    for _ in range(steps):
        optimizer.step()
    found = optimizer.state[p]["exp_avg_sq"].float()
    assert len(found.unique()) > 5
    # One rounding is off by less than 2^-7 of the value; they are independent.
    bound = 5 * 2**-7 * math.sqrt(steps / len(found))
    assert float(found.mean()) == pytest.approx(0.999**steps, abs=bound)


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_rounding(turn: int) -> None:
    """Up with the probability of what is cut off; what bfloat16 holds stays."""
    place = {"step": 3, "tensor_id": 1, "turn": turn}
    x = torch.full((100_000,), 1.0 + 2**-7 * 0.3)
    up = (round_stochastically(x, **place).float() > 1).float().mean()
    assert float(up) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / len(x)))
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, 2.0**-130])
    rounded = round_stochastically(exact, **place).float()
    assert torch.equal(rounded, exact)
    assert torch.equal(rounded.signbit(), exact.signbit())
    assert bool(round_stochastically(torch.tensor([math.nan]), **place).isnan().all())


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_states_stay_so(backend: str, value: float) -> None:
    p = torch.nn.Parameter(torch.zeros(40))
    optimizer = AdamW([p], 0.01, backend=backend, **LOW)
    p.grad = torch.ones_like(p)
    p.grad[5] = p.grad[37] = value
    optimizer.step()
    held = optimizer.state[p]["exp_avg"].float()
    assert not held[5].isfinite()
    assert not held[37].isfinite()
    assert int((~held.isfinite()).sum()) == 2


@every_backend
@every_make
def test_resumes_with_the_same_bits(make: Any, backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = make(params, backend=backend)
    rows = record_grads(params, 6)
    advance(optimizer, params, rows[:3])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(copies, backend=backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(optimizer, params, rows[3:])
    advance(other, copies, rows[3:])
    for x, y in zip(bits(params, optimizer), bits(copies, other), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@every_backend
def test_checkpoints_of_another_precision(backend: str) -> None:
    """A group's state_dtype comes with its checkpoint; torch's has none, and is converted."""
    params = make_params([(50,)])
    twin = torch.optim.AdamW(params, 0.01)
    rows = record_grads(params, 2)
    advance(twin, params, rows[:1])
    optimizer = AdamW(params, 0.01, backend=backend, **LOW)
    optimizer.load_state_dict(twin.state_dict())
    state, held = optimizer.state[params[0]], twin.state[params[0]]["exp_avg"]
    assert torch.equal(state["exp_avg"], held.to(torch.bfloat16))
    advance(optimizer, params, rows[1:])
    wide = AdamW(params, 0.01, backend=backend)
    wide.load_state_dict(optimizer.state_dict())
    assert wide.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    advance(wide, params, rows[1:])
    twin.load_state_dict(optimizer.state_dict())
    advance(twin, params, rows[1:])
    assert twin.state[params[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "message"),
    [
        (torch.float32, torch.float16, "state_dtype must be None, torch.float32 or"),
        (torch.float32, "bf16", "state_dtype must be None, torch.float32 or"),
        (torch.float64, torch.bfloat16, "does not go with torch.float64 parameters"),
        (torch.complex64, torch.bfloat16, "does not go with complex parameters"),
    ],
)
def test_refused(dtype: torch.dtype, state_dtype: Any, message: str) -> None:
    params = make_params([(3,)], dtype)
    for make in (Adam, AdamW, Adagrad):
        with pytest.raises(ValueError, match=message):
            make(params, state_dtype=state_dtype)


@every_backend
def test_a_state_of_the_wrong_precision_is_refused(backend: str) -> None:
    params = make_params([(30,)])
    optimizer = AdamW(params, 0.01, backend=backend, **LOW)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].float()
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"'exp_avg'.* has dtype .*float32, expected .*bfloat16"):
        advance(optimizer, params, rows[1:])
    assert torch.equal(params[0], before)


@every_backend
def test_the_option_can_be_changed_between_steps(backend: str) -> None:
    """By group, as other options; states that are there are then refused, not reinterpreted."""
    params = make_params([(30,)])
    optimizer = AdamW(params, 0.01, backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    with pytest.raises(ValueError, match=r"expected .*bfloat16"):
        advance(optimizer, params, rows[1:])


def test_trains_like_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, generator=generator)
    y = torch.sign(x @ torch.randn(40, generator=generator))
    losses = []
    for state_dtype in (None, torch.bfloat16):
        w = torch.nn.Parameter(torch.zeros(40))
        optimizer = pysmooth.AdamW([w], 0.05, state_dtype=state_dtype)
        for _ in range(200):
            optimizer.zero_grad()
            loss = torch.nn.functional.softplus(-y * (x @ w)).mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] < 0.2
