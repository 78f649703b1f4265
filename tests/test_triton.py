"""The Triton kernels, in Triton's interpreter, against the CPU backend and float64.

Bits are compared wherever no sum is involved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from battery import advance, assert_same_bits, make_params, record_grads, set_grads
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels import plan
from pysmooth.triton_kernels.table import CHUNK

from pysmooth.engine.amp import Amp
from pysmooth.engine.triton import TritonEngine

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
low = {"state_dtype": torch.bfloat16}

# Without a norm: cpu and triton are to agree to the bit.
ELEMENTWISE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (pysmooth.ClipSGD, {"lr": 0.1, "weight_decay": 0.1}),
    "decoupled": (
        pysmooth.ClipSGD,
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    "momentum": (pysmooth.ClipSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (pysmooth.ClipSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "value": (pysmooth.ClipSGD, {"lr": 0.1, "clip": "value", "max_norm": 0.5}),
    "adagrad": (pysmooth.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    "adam": (pysmooth.Adam, {"weight_decay": 0.1}),
    "amsgrad": (pysmooth.AdamW, {"amsgrad": True}),
    "sign_sgd": (pysmooth.SignSGD, {}),
    "signum": (pysmooth.Signum, {}),
    "lion": (pysmooth.Lion, {"weight_decay": 0.1}),
    "accumulator": (pysmooth.AdagradNorm, {"lr": 0.1, "b_init": 0.1, "coordinate_wise": True}),
    "accumulator_momentum": (
        pysmooth.AdamDNorm,
        {"lr": 0.1, "b_init": 0.5, "coordinate_wise": True},
    ),
    "threshold": (
        pysmooth.EFSGD,
        {
            "lr": 0.1,
            "compressor": pysmooth.HardThreshold(0.05),
            "momentum": 0.9,
            "weight_decay": 0.1,
            "nonfinite": "zero",
        },
    ),
    "identity": (
        pysmooth.EF21,
        {
            "lr": 0.1,
            "compressor": pysmooth.Identity(),
            "eta": 0.5,
            "init": "full",
            "nonfinite": "zero",
        },
    ),
    "adam_low": (pysmooth.Adam, {"weight_decay": 0.1, **low}),
    "amsgrad_low": (pysmooth.Adam, {"amsgrad": True, **low}),
    "adagrad_low": (pysmooth.Adagrad, low),
}
elementwise = pytest.mark.parametrize("name", ELEMENTWISE)


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return params + [optimizer.state[p][k] for p in params for k in sorted(optimizer.state[p])]


def both(name: str, params: Callable[[], list[Parameter]], rows: Sequence[Any]) -> list[Tensor]:
    """The same steps on both backends; returns what came out."""
    make, kwargs = ELEMENTWISE[name]
    out = []
    for backend in ("triton", "cpu"):
        mine = params()
        optimizer = make(mine, backend=backend, **kwargs)
        assert optimizer.resolved_backend == backend
        for row in rows:
            row(mine) if callable(row) else set_grads(mine, row)
            optimizer.step()
        out.append(tensors(optimizer))
    assert_same_bits(*out)
    return out[0]


# ---- the rules -----------------------------------------------------------------------------------


@elementwise
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_rules_have_the_bits_of_the_cpu_backend(name: str, dtype: torch.dtype) -> None:
    _, kwargs = ELEMENTWISE[name]
    if dtype.is_complex and kwargs.get("clip") == "value":
        pytest.skip("no meaning for complex parameters")
    if "state_dtype" in kwargs and dtype in (torch.float64, torch.complex64):
        pytest.skip("no bfloat16 states beside these")
    start = make_params(dtype=dtype)
    out = both(name, lambda: make_params(dtype=dtype), record_grads(start, 3))
    assert not torch.equal(out[4], start[4])  # 5,003 numbers: some move even in 16 bits


@pytest.mark.parametrize("name", ["momentum", "adam", "adam_low"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_another_dtype(name: str, grad_dtype: torch.dtype) -> None:
    dtype = torch.bfloat16 if grad_dtype == torch.float32 else torch.float32

    def params() -> list[Parameter]:
        out = make_params(dtype=dtype)
        for p in out:
            p.grad_dtype = grad_dtype
        return out

    both(name, params, record_grads(params(), 3, dtype=grad_dtype))


@pytest.mark.parametrize("name", ["momentum", "adam_low", "lion"])
def test_infinities_and_nan_pass_as_on_cpu(name: str) -> None:
    def row(params: list[Parameter]) -> None:
        for p, value in zip(params, (math.inf, -math.inf, math.nan, 1e38, 1e-45), strict=True):
            p.grad = torch.full_like(p, value)

    make, kwargs = ELEMENTWISE[name]
    results = []
    for backend in ("triton", "cpu"):
        params = make_params([(3,)] * 5)
        optimizer = make(params, backend=backend, **kwargs)
        for _ in range(2):
            row(params)
            optimizer.step()
        results.append(tensors(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- sizes and layouts ---------------------------------------------------------------------------

SIZES = [1, 15, 16, 17, 31, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 16, 3 * CHUNK - 15]


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("name", ["momentum", "adam_low"])
def test_ends_of_tensors_and_chunks(name: str) -> None:
    shapes = [(n,) for n in SIZES]
    both(name, lambda: make_params(shapes), record_grads(make_params(shapes), 2))


def laid_out(kind: str, x: Tensor) -> Tensor:
    """A tensor of the same values, otherwise in memory."""
    if kind == "transposed":
        return x.transpose(0, 3).contiguous().transpose(0, 3)
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "strided":
        return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
    if kind == "offset":
        return torch.cat([torch.zeros(1, dtype=x.dtype), x.reshape(-1)])[1:].view_as(x)
    if kind == "expanded":
        return x[:, :1, :1].expand_as(x)
    return x.clone()


KINDS = ["plain", "transposed", "channels_last", "strided", "offset"]


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("name", ["momentum", "adam_low"])
@pytest.mark.parametrize("param", KINDS)
@pytest.mark.parametrize("grad", [*KINDS, "expanded"])
def test_layouts(name: str, param: str, grad: str) -> None:
    def params() -> list[Parameter]:
        gen = torch.Generator().manual_seed(1)
        return [Parameter(laid_out(param, torch.randn(3, 4, 5, 6, generator=gen)))]

    gen = torch.Generator().manual_seed(2)
    values = [torch.randn(3, 4, 5, 6, generator=gen) for _ in range(2)]

    def row(value: Tensor) -> Callable[[list[Parameter]], None]:
        def give(mine: list[Parameter]) -> None:
            mine[0].grad = laid_out(grad, value)

        return give

    both(name, params, [row(v) for v in values])


def test_a_strided_parameter_leaves_the_gaps_alone() -> None:
    memory = torch.full((6, 8), 7.0)
    p = Parameter(memory[:, ::2])
    optimizer = pysmooth.ClipSGD([p], 0.5, backend="triton")
    p.grad = torch.ones(6, 4)
    optimizer.step()
    assert torch.equal(memory[:, ::2], torch.full((6, 4), 6.5))
    assert torch.equal(memory[:, 1::2], torch.full((6, 4), 7.0))


def test_tensors_of_all_kinds_in_one_list() -> None:
    def params() -> list[Parameter]:
        gen = torch.Generator().manual_seed(3)
        out = []
        for i, dtype in enumerate(DTYPES):
            x = torch.randn(3, 4, 5, 6, generator=gen).to(dtype)
            out.append(Parameter(laid_out(KINDS[i], x)))
        return out

    both("momentum", params, record_grads(params(), 3))


# ---- passes before apply -------------------------------------------------------------------------

PASSES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "normalized": (pysmooth.NormalizedSGD, {"lr": 0.1, "weight_decay": 0.1}),
    "clip21": (pysmooth.Clip21, {"lr": 0.1, "tau": 2.0}),
    "clip21_group": (pysmooth.Clip21SGD2M, {"lr": 0.1, "tau": 0.5, "scope": "group"}),
    "sign": (pysmooth.EFSGD, {"lr": 0.1, "compressor": pysmooth.ScaledSign()}),
    "sign_global": (
        pysmooth.EFSGD,
        {"lr": 0.1, "compressor": pysmooth.ScaledSign(scope="global"), "momentum": 0.9},
    ),
    "ef21": (
        pysmooth.EF21,
        {"lr": 0.1, "compressor": pysmooth.ScaledSign(), "normalize": True, "scope": "tensor"},
    ),
    "scaled": (pysmooth.SignSGD, {"lr": 0.1, "scaled": True, "momentum": 0.5}),
}


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("name", PASSES)
def test_passes_as_on_cpu(name: str) -> None:
    """Sums differ in the last place: so may what is made of them."""
    make, kwargs = PASSES[name]
    shapes = [(n,) for n in (1, 17, 33, CHUNK + 1)]
    rows = record_grads(make_params(shapes), 3)
    results = []
    for backend in ("triton", "cpu"):
        params = make_params(shapes)
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = make(groups, backend=backend, **kwargs)
        advance(optimizer, params, rows)
        results.append(tensors(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_scale_is_the_cpus_but_for_its_float32_sums(scope: str) -> None:
    """The CPU adds up to 32 magnitudes in a lane in float32 (docs/decisions/015); this, none."""
    shapes = [(3 * CHUNK + 5,), (77,)]
    gradients = record_grads(make_params(shapes), 1)[0]
    counted = gradients if scope == "global" else gradients[:1]
    exact = torch.cat([g.double().abs().flatten() for g in counted]).mean().item()
    found = {}
    for backend in ("triton", "cpu"):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        compressor = pysmooth.ScaledSign(scope=scope)  # type: ignore[arg-type]
        optimizer = pysmooth.EFSGD(params, 1.0, compressor, backend=backend)
        advance(optimizer, params, [gradients])
        found[backend] = params[0].detach().abs().unique().tolist()
    ((ours,), (theirs,)) = found["triton"], found["cpu"]
    assert ours == pytest.approx(exact, rel=2**-23, abs=0)
    assert theirs == pytest.approx(ours, rel=34 * 2**-24, abs=0)


def test_a_skipped_first_step_does_not_fill_in_the_gradient() -> None:
    """EF21's estimate starts as the first gradient that counts."""
    (p,) = make_params([(4,)])
    kwargs: dict[str, Any] = {"compressor": pysmooth.Identity(), "init": "full", "eta": 0.5}
    optimizer = pysmooth.EF21([p], 0.1, backend="triton", **kwargs)
    p.grad = torch.full((4,), math.nan)
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    assert not optimizer.state
    p.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["grad_estimate"], p.grad)


# ---- AMP on the device ---------------------------------------------------------------------------


def test_scale_and_overflow_flag_are_read_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody turns them into Python numbers."""
    params, plain = make_params(), make_params()
    optimizer = pysmooth.Adam(params, max_norm=1.0, backend="triton")
    twin = pysmooth.Adam(plain, max_norm=1.0, backend="triton")
    rows = record_grads(params, 3)
    monkeypatch.delattr(Amp, "read")
    scale = torch.tensor(4.0)
    for i, row in enumerate(rows):
        optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(float(i == 1))
        set_grads(params, [4 * g for g in row])
        optimizer.step()
        if i != 1:
            advance(twin, plain, [row])
        else:
            assert_same_bits(params, plain)
    assert_same_bits(params, plain)
    assert optimizer.skipped_steps() == 0  # that was GradScaler's doing
    assert all(optimizer.state[p]["step"] == 2 for p in params if p.numel())


def test_an_overflow_in_the_very_first_step_leaves_no_state() -> None:
    (p,) = make_params([(4,)])
    optimizer = pysmooth.ClipSGD([p], 0.1, momentum=0.9, dampening=0.5, backend="triton")
    optimizer.found_inf = torch.ones(())
    p.grad = torch.ones(4)
    optimizer.step()
    assert not optimizer.state
    del optimizer.found_inf
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(4))  # a first step


# ---- what cannot be done -------------------------------------------------------------------------


def test_refusals_name_what_they_refuse() -> None:
    p = Parameter(torch.zeros(3, dtype=torch.float8_e4m3fn))
    p.grad = torch.zeros(3, dtype=torch.float8_e4m3fn)
    optimizer = pysmooth.ClipSGD([p], 0.1, backend="triton")
    with pytest.raises(pysmooth.BackendError, match="float8_e4m3fn"):
        optimizer.step()
    with pytest.raises(pysmooth.BackendError, match=r"takes CUDA and CPU parameters only.*meta"):
        pysmooth.ClipSGD([Parameter(torch.zeros(3, device="meta"))], 0.1, backend="triton")


def test_more_dimensions_than_a_layout_holds() -> None:
    x = torch.zeros((2,) * 17)[..., None].expand((2,) * 17 + (2,))[..., 0]
    order = list(range(17))
    p = Parameter(x.clone())
    optimizer = pysmooth.ClipSGD([p], 0.1, backend="triton")
    p.grad = torch.ones((2,) * 17).permute(order[::-1])
    with pytest.raises(ValueError, match="dimensions that cannot be merged"):
        optimizer.step()


def test_specs_are_compiled_for_what_they_say() -> None:
    """All that reaches the compiler comes from plan.py: nothing there depends on numbers."""
    method = plan.Method(0, False, False, False, 2.0, True)
    a = plan.reduce_spec(torch.float32, method, 0, True)
    b = plan.reduce_spec(torch.float32, method, 0, True)
    assert a == b
    assert hash(a) == hash(b)


# ---- what the host does --------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_changes_between_steps_are_noticed(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the native module, or in Python where there is none: the same steps."""
    if not native:
        monkeypatch.setattr("pysmooth.engine.triton._watch", lambda *_: None)

    def run(backend: str) -> list[Tensor]:
        params = make_params([(5, 4), (33,), (1,), (0, 2)])
        optimizer: Any = pysmooth.ClipSGD(params, 0.1, momentum=0.9, backend=backend)
        rows = record_grads(params, 7)
        set_grads(params, rows[0])
        params[1].grad = None
        optimizer.step()  # one joins later
        for step, row in enumerate(rows[1:]):
            set_grads(params, row)
            if step == 1:
                params[0].grad = row[0].float().t().contiguous().t()  # another layout
            elif step == 2:
                optimizer.state[params[0]]["momentum_buffer"] = torch.ones(5, 4)
            elif step == 3:
                params[1].data = params[1].detach().clone()
            elif step == 4:
                params[2].grad = torch.complex(row[2].float(), row[2].float()).conj().imag
            optimizer.step()
        return tensors(optimizer)

    assert_same_bits(run("triton"), run("cpu"))


def test_a_usual_step_asks_nothing_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    optimizer = pysmooth.Adam(params, max_norm=1.0, backend="triton")
    rows = record_grads(params, 3)
    advance(optimizer, params, rows[:1])
    monkeypatch.delattr(TritonEngine, "_gathered")
    advance(optimizer, params, rows[1:])
    params[0].grad = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3
    assert optimizer.state[params[1]]["step"] == 4


def test_a_learning_rate_on_the_device_is_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysmooth.engine.triton.LATE", ("cpu",))
    params, plain = make_params(), make_params()
    lr = torch.tensor(0.1)
    optimizer = pysmooth.AdamW(params, lr=lr, weight_decay=0.1, backend="triton")
    twin = pysmooth.AdamW(plain, lr=0.1, weight_decay=0.1, backend="triton")
    rows = record_grads(params, 3)
    for step, row in enumerate(rows):
        lr.fill_(0.1 / (1 + step))
        twin.param_groups[0]["lr"] = float(lr)
        with monkeypatch.context() as patched:
            if step:  # the first one looks at the arguments
                patched.setattr(Tensor, "__float__", lambda _: pytest.fail("the host waited"))
            advance(optimizer, params, [row])
        advance(twin, plain, [row])
    assert_same_bits(params, plain)
    optimizer.param_groups[0]["lr"] = torch.tensor(1, dtype=torch.int64)
    with pytest.raises((ValueError, TypeError), match="lr"):
        optimizer.step()
