"""Tensors read through torch's C functions, without Python objects: what only that way could break.

Results are compared with the other ways in test_same_bits.py and test_determinism.py.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import _cpu


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    _cpu.set_direct_enabled(True)


def test_this_torch_has_it() -> None:
    assert _cpu.uses_direct()


@pytest.mark.parametrize(
    ("off", "left"), [("DIRECT", "False True"), ("DLPACK", "True False"), ("", "True True")]
)
def test_the_environment_switches_it_off(off: str, left: str) -> None:
    """For good: what tests call does not bring it back."""
    code = """
import torch
from pysmooth import _cpu
_cpu.set_direct_enabled(True)
_cpu.set_dlpack_enabled(True)
print(_cpu.uses_direct(), _cpu.uses_dlpack())
"""
    env = {**os.environ, f"PYSMOOTH_{off}": "0"}
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == left


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [8, 1 << 20])  # the second gives up the GIL
def test_writes_are_counted(direct: bool, size: int) -> None:
    _cpu.set_direct_enabled(direct)
    written, idle = Parameter(torch.ones(size)), Parameter(torch.ones(3))
    written.grad = torch.ones(size)
    optimizer = pysmooth.ClipSGD([written, idle], 0.1, momentum=0.9, max_norm=1.0, backend="cpu")
    for k in range(1, 4):
        optimizer.step()
        assert (written._version, idle._version) == (k, 0)
    before = written.grad._version
    pysmooth.clip_grad_norm_([written, idle], 1e-3)
    assert written.grad._version == before + 1


def test_a_skipped_step_counts_no_write() -> None:
    p = Parameter(torch.ones(8))
    p.grad = torch.full((8,), torch.inf)
    optimizer = pysmooth.ClipSGD([p], 0.1, max_norm=1.0, nonfinite="skip", backend="cpu")
    optimizer.step()
    assert p._version == 0


Strange = Callable[[], tuple[Tensor, Tensor]]


def conjugate() -> tuple[Tensor, Tensor]:
    grad = torch.tensor([1 + 2j, 3 - 1j]).conj()
    return grad, grad.resolve_conj()


def negative() -> tuple[Tensor, Tensor]:
    grad = torch.tensor([1 + 2j]).conj().imag
    assert grad.is_neg()
    return grad, torch.tensor([-2.0])


def negative_strided() -> tuple[Tensor, Tensor]:
    grad = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    return grad, torch.tensor([-2.0, 1.0])


def negative_dense() -> tuple[Tensor, Tensor]:
    """Both parts in turn, with the sign that `.imag` left behind."""
    grad = torch.tensor([1 + 2j, 3 - 1j]).conj().imag.as_strided((4,), (1,), 0)
    assert grad.is_neg()
    return grad, grad.resolve_neg()


def zero_dim() -> tuple[Tensor, Tensor]:
    return torch.tensor(3.0), torch.tensor(3.0)


def unit_sizes() -> tuple[Tensor, Tensor]:
    grad = torch.arange(6.0).as_strided((1, 3, 1), (77, 2, 5))
    return grad, grad.contiguous()


def backwards_bf16() -> tuple[Tensor, Tensor]:
    grad = torch.arange(12.0).view(3, 4).t().to(torch.bfloat16)
    return grad, grad.contiguous()


class Named(Tensor):
    """A subclass that means nothing by it."""


def subclass() -> tuple[Tensor, Tensor]:
    return torch.arange(4.0).as_subclass(Named), torch.arange(4.0)


STRANGE: list[Strange] = [
    *(
        conjugate,
        negative,
        negative_strided,
        negative_dense,
        zero_dim,
        unit_sizes,
        backwards_bf16,
        subclass,
    )
]


@pytest.mark.parametrize("make", STRANGE, ids=lambda f: f.__name__)
def test_gradients_mean_what_python_says(make: Strange) -> None:
    grad, plain = make()
    kind = torch.float32 if plain.dtype == torch.bfloat16 else plain.dtype
    p, twin = (Parameter(torch.zeros(plain.shape, dtype=kind)) for _ in range(2))
    optimizer = pysmooth.ClipSGD([p], 0.5, momentum=0.9, backend="cpu")
    reference = torch.optim.SGD([twin], 0.5, momentum=0.9)
    for _ in range(3):
        if grad.dtype == kind:
            p.grad = grad
        else:
            p.grad = None
            p.grad_dtype = None  # type: ignore[attr-defined]
            p.grad = grad
        twin.grad = plain.to(kind)
        optimizer.step()
        reference.step()
    assert torch.equal(p, twin)


def test_gradients_come_and_go() -> None:
    params = [Parameter(torch.zeros(5)) for _ in range(4)]
    optimizer = pysmooth.ClipSGD(params, 1.0, backend="cpu")
    for mask in range(16):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = torch.ones(5) if mask >> i & 1 else None
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            assert torch.equal(p, old - (mask >> i & 1))


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        grad = torch.full((4,), 2.0)
    p = Parameter(torch.zeros(4))
    p.grad = grad
    pysmooth.clip_grad_norm_([p], 1.0)
    assert torch.allclose(grad.clone(), torch.full((4,), 0.5))
    pysmooth.ClipSGD([p], 1.0, backend="cpu").step()
    assert torch.allclose(p, torch.full((4,), -0.5))


def test_what_was_swapped_away_and_freed() -> None:
    """The plan knows a parameter by its TensorImpl, which goes with the tensor swapped for it."""
    params = [Parameter(torch.zeros(64)) for _ in range(8)]
    optimizer = pysmooth.ClipSGD(params, 1.0, momentum=0.5, backend="cpu")
    for p in params:
        p.grad = torch.ones(64)
    optimizer.step()
    for p in params:
        p.grad = None
        torch.utils.swap_tensors(p, Parameter(torch.full((64,), 7.0)))
    gc.collect()
    rubbish = [torch.full((64,), torch.nan) for _ in range(64)]
    for p in params:
        p.grad = torch.zeros(64)
    optimizer.step()
    assert all(torch.equal(p, torch.full((64,), 6.5)) for p in params)
    del rubbish


def test_other_threads_may_replace_gradients_during_a_step() -> None:
    p = Parameter(torch.zeros(1 << 21))
    p.grad = torch.zeros(1 << 21)
    optimizer = pysmooth.ClipSGD([p], 1.0, momentum=0.9, max_norm=1.0, backend="cpu")
    optimizer.step()
    stop = threading.Event()
    replaced = 0

    def replace() -> None:
        nonlocal replaced
        while not stop.is_set():
            p.grad = torch.zeros(1 << 21)
            replaced += 1

    other = threading.Thread(target=replace)
    other.start()
    try:
        for _ in range(30):
            optimizer.step()
            pysmooth.clip_grad_norm_([p], 1.0)
    finally:
        stop.set()
        other.join()
    assert replaced > 0
    assert not p.detach().any()


def test_nothing_is_held_after_a_step() -> None:
    p = Parameter(torch.zeros(1 << 20))
    p.grad = torch.ones(1 << 20)
    references = p.grad._use_count()  # type: ignore[attr-defined]
    optimizer = pysmooth.ClipSGD([p], 1.0, max_norm=1.0, backend="cpu")
    optimizer.step()
    pysmooth.clip_grad_norm_([p], 1.0)
    assert p.grad._use_count() == references  # type: ignore[attr-defined]
    p.grad = None
    torch.utils.swap_tensors(p, Parameter(torch.zeros(1 << 20)))  # wants the only references
