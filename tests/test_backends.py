"""Which backend runs: by name, by device, and where the native module is missing."""

from __future__ import annotations

import builtins
import copy
import importlib
import importlib.util
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import _cpu, reference
from pysmooth.engine import backends

REASON = "libgomp.so.1: cannot open shared object file"


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the extension could not be loaded, with no answer kept from before or for later."""
    load = importlib.import_module

    def refuse(name: str, package: str | None = None) -> types.ModuleType:
        if name == "pysmooth._cpu":
            raise ImportError(REASON)
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    backends._load_native.cache_clear()
    yield
    backends._load_native.cache_clear()


def parameters(device: str = "cpu") -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in [(30, 7), (64,), ()]:
        p = Parameter(torch.randn(shape, generator=generator).to(device))
        p.grad = torch.randn(shape, generator=generator).to(device)
        params.append(p)
    return params


def grads(params: list[Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


# ---- by name -------------------------------------------------------------------------------------


def test_names() -> None:
    assert backends.available_backends() == ("cpu", "eager")
    assert set(backends.available_backends()) < set(backends.BACKENDS)
    for asked, given in [("auto", "cpu"), ("cpu", "cpu"), ("eager", "eager")]:
        optimizer = pysmooth.ClipSGD(parameters(), 0.1, backend=asked)  # type: ignore[arg-type]
        assert optimizer.resolved_backend == given
        optimizer.step()
        assert optimizer.resolved_backend == given
        assert backends.make_engine(given).name == given


@pytest.mark.parametrize("name", ["gpu", "CPU", "", None, 3])
def test_unknown_names(name: Any) -> None:
    with pytest.raises(
        ValueError, match="backend must be one of auto, cpu, cuda, triton, eager; got"
    ) as caught:
        pysmooth.ClipSGD(parameters(), 0.1, backend=name)
    assert repr(name) in str(caught.value)


def test_backend_error_is_an_exception_people_can_catch() -> None:
    assert issubclass(pysmooth.BackendError, RuntimeError)
    assert pysmooth.BackendError.__module__.startswith("pysmooth")


def test_a_copy_keeps_the_backend() -> None:
    for name in ("cpu", "eager"):
        optimizer = pysmooth.ClipSGD(parameters(), 0.1, backend=name)  # type: ignore[arg-type]
        optimizer.step()
        assert copy.deepcopy(optimizer).resolved_backend == name


def test_both_backends_agree() -> None:
    results = {}
    for name in ("cpu", "eager"):
        params = parameters()
        optimizer = pysmooth.ClipSGD(params, 0.1, momentum=0.9, max_norm=1.0, backend=name)  # type: ignore[arg-type]
        for _ in range(3):
            optimizer.step()
        results[name] = [p.detach() for p in params]
        norm = optimizer.last_norm()
        assert norm is not None
        results[name].append(norm)
    torch.testing.assert_close(results["cpu"], results["eager"])


# ---- by device -----------------------------------------------------------------------------------


def meta() -> Parameter:
    return Parameter(torch.zeros(3, device="meta"))


def test_meta_parameters_are_refused_by_the_cpu_backend() -> None:
    message = r"backend 'cpu' takes CPU parameters only; these are on \['cpu', 'meta'\]"
    with pytest.raises(pysmooth.BackendError, match=message):
        pysmooth.ClipSGD([*parameters(), meta()], 0.1, backend="cpu")


def test_a_refused_group_is_not_added() -> None:
    optimizer = pysmooth.ClipSGD(parameters(), 0.1, backend="cpu")
    with pytest.raises(pysmooth.BackendError, match="meta"):
        optimizer.add_param_group({"params": [meta()]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_auto_leaves_what_is_not_on_the_cpu_to_torch() -> None:
    assert pysmooth.ClipSGD([meta()], 0.1).resolved_backend == "eager"
    optimizer = pysmooth.ClipSGD(parameters(), 0.1)
    assert optimizer.resolved_backend == "cpu"
    optimizer.add_param_group({"params": [meta()]})
    assert optimizer.resolved_backend == "eager"


def test_functions_on_meta_gradients_do_as_torch_does() -> None:
    p = meta()
    p.grad = torch.zeros(3, device="meta")
    norm = pysmooth.clip_grad_norm_([p], 1.0)
    assert norm.device.type == "meta"
    assert norm.shape == ()
    assert pysmooth.get_total_norm([p.grad]).device.type == "meta"
    pysmooth.clip_grads_with_norm_([p], 1.0, norm)


# ---- without the native module -------------------------------------------------------------------


@pytest.mark.usefixtures("no_native")
class TestWithoutTheNativeModule:
    def test_cpu_says_why_and_what_to_do(self) -> None:
        assert backends.available_backends() == ("eager",)
        with pytest.raises(pysmooth.BackendError) as caught:
            pysmooth.ClipSGD(parameters(), 0.1, backend="cpu")
        message = str(caught.value)
        assert "backend 'cpu' is not available" in message
        assert REASON in message
        assert "backend='eager'" in message
        with pytest.raises(pysmooth.BackendError, match="not available"):
            pysmooth.engine.probe.isa()

    def test_auto_runs_in_torch(self) -> None:
        params, twins = parameters(), parameters()
        optimizer = pysmooth.ClipSGD(params, 0.1, momentum=0.9, weight_decay=0.1)
        twin = torch.optim.SGD(twins, 0.1, momentum=0.9, weight_decay=0.1)
        assert optimizer.resolved_backend == "eager"
        for _ in range(3):
            optimizer.step()
            twin.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q)

    @pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), 3.0])
    def test_functions_still_work(self, norm_type: float) -> None:
        params, twins = parameters(), parameters()
        norm = pysmooth.clip_grad_norm_(params, 1.0, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(twins, 1.0, norm_type)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(grads(params), grads(twins))
        torch.testing.assert_close(
            pysmooth.get_total_norm(grads(params), norm_type), torch.tensor(1.0), rtol=1e-5, atol=0
        )
        pysmooth.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0))
        torch.testing.assert_close(grads(params)[1], grads(twins)[1] / 2)

    def test_a_checkpoint_moves_to_it(self) -> None:
        # Written where the native module is, loaded where it is not.
        state = {"momentum_buffer": torch.ones(64)}
        params = parameters()
        optimizer = pysmooth.ClipSGD([params[1]], 0.1, momentum=0.9)
        saved = optimizer.state_dict()
        saved["state"] = {0: state}
        optimizer.load_state_dict(saved)
        before, grad = params[1].detach().clone(), grads(params)[1]
        optimizer.step()
        torch.testing.assert_close(params[1].detach(), before - 0.1 * (0.9 + grad))


def test_import_needs_no_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh import of everything public, with every import of the extension refused.
    load = builtins.__import__
    seen = []

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.endswith("_cpu") and "pysmooth" in name:
            seen.append(name)
            raise ImportError(REASON)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in ("pysmooth", "pysmooth._clip_grad", "pysmooth.engine.native", "pysmooth.optim"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert seen == []


def test_the_cuda_module_loads_without_a_driver() -> None:
    """Where it was built; it says itself what it misses."""
    module = pytest.importorskip("pysmooth._cuda", reason="the CUDA module was not built")
    assert module.device_type == "cuda"
    assert {rule["name"] for rule in module.rules()} <= {rule["name"] for rule in _cpu.rules()}
    if not torch.cuda.is_available():
        assert "cuda" not in backends.available_backends()
        with pytest.raises(pysmooth.BackendError, match="backend 'cuda' is not available: torch"):
            pysmooth.ClipSGD(parameters(), 0.1, backend="cuda")


# ---- rules ---------------------------------------------------------------------------------------


def test_all_backends_have_the_same_rules() -> None:
    """Names, hyper-parameters, states and what else a recipe depends on."""
    published = {rule["name"]: rule for rule in _cpu.rules()}
    assert set(reference.RULES) == set(published)
    triton = pytest.importorskip("pysmooth.triton_kernels.rules").RULES
    assert {name for name, rule in triton.items() if not rule.marks} == set(published)
    for name, rule in triton.items():
        cpu = published[name.replace("_marked", "")]  # a form of the same rule
        assert list(rule.hyper) == list(cpu["hyper"]), name
        assert rule.states == cpu["states"] + rule.marks, name
        assert rule.counts_steps == cpu["counts_steps"], name
        assert (rule.accumulate is not None) == cpu["accumulates"], name


# ---- on a GPU ------------------------------------------------------------------------------------

CLIPS: list[dict[str, Any]] = [
    {"max_norm": 1.0},
    {"max_norm": 1.0, "clip": "smooth", "scope": "tensor"},
    {"max_norm": 0.5, "clip": "value"},
    {"max_norm": None},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_cuda_steps(dtype: torch.dtype, clip: dict[str, Any]) -> None:
    def run(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)

        def values(shape: tuple[int, ...]) -> Tensor:  # the same rounded values for both
            return place(torch.randn(shape, generator=generator).to(dtype))

        shapes = [(30, 70), (64,), (), (0,)]
        params = [Parameter(values(s)) for s in shapes]
        optimizer = pysmooth.ClipSGD(params, 0.1, momentum=0.9, weight_decay=0.1, **clip)
        for _ in range(3):
            for p in params:
                p.grad = values(tuple(p.shape))
            optimizer.step()
        if clip["max_norm"] is not None and clip.get("clip") != "value":
            assert optimizer.last_norm() is not None
        return [p.detach().cpu().double() for p in params]

    ours, truth = run(lambda x: x.cuda()), run(lambda x: x.double())
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours, truth, rtol=4 * eps, atol=8 * eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_cuda_clip(dtype: torch.dtype, norm_type: float) -> None:
    params = parameters("cuda")
    for p in params:
        p.data, p.grad = p.data.to(dtype), None
        p.grad = torch.randn(p.shape, dtype=dtype, device="cuda")
    wide = [g.cpu().double() for g in grads(params)]
    expected = float(torch.nn.utils.get_total_norm(wide, norm_type))
    norm = pysmooth.clip_grad_norm_(params, 0.5, norm_type)
    assert norm.device.type == "cuda"
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for grad, old in zip(grads(params), wide, strict=True):
        torch.testing.assert_close(
            grad.cpu().double(), old * (0.5 / (expected + 1e-6)), rtol=eps, atol=1e-7
        )


@pytest.mark.gpu
def test_cuda_parameters_are_refused_by_the_cpu_backend() -> None:
    with pytest.raises(pysmooth.BackendError, match=r"these are on \['cuda'\]"):
        pysmooth.ClipSGD(parameters("cuda"), 0.1, backend="cpu")
    taken = pysmooth.ClipSGD(parameters("cuda"), 0.1).resolved_backend
    assert taken == next(
        b for b in ("cuda", "triton", "eager") if b in backends.available_backends()
    )


@pytest.mark.gpu
def test_parameters_on_both_devices() -> None:
    params, twins = [*parameters(), *parameters("cuda")], [*parameters(), *parameters()]
    for p in params + twins:
        assert p.grad is not None
    norm = pysmooth.clip_grad_norm_(params, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(twins, 1.0)
    torch.testing.assert_close(norm.cpu(), expected)
    for g, h in zip(grads(params), grads(twins), strict=True):
        torch.testing.assert_close(g.cpu(), h)
