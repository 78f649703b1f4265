"""What backends refuse whose kernels run on a device: by name, and with everything as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from battery import DEVICE_BACKENDS, assert_unchanged, snapshot
from torch import Tensor
from torch.nn import Parameter

from pysmooth import AdamW, BackendError, ClipSGD

pytestmark = pytest.mark.skipif(
    not DEVICE_BACKENDS, reason="neither PYSMOOTH_EMULATED=1 nor TRITON_INTERPRET=1 is set"
)
on_devices = pytest.mark.parametrize("backend", DEVICE_BACKENDS)


def negative() -> Tensor:
    return torch.zeros(3, dtype=torch.complex64).conj().imag.requires_grad_()


def conjugate() -> Tensor:
    return torch.zeros(3, dtype=torch.complex64).conj().requires_grad_()


@on_devices
@pytest.mark.parametrize("make", [negative, conjugate])
def test_a_parameter_that_is_to_be_resolved(make: Callable[[], Tensor], backend: str) -> None:
    good, p = Parameter(torch.ones(2)), make()
    optimizer = ClipSGD([good, p], lr=0.1, momentum=0.9, max_norm=1.0, backend=backend)
    good.grad, p.grad = torch.ones(2), torch.ones_like(p.detach())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'group 0, parameter 1' has its conjugate or negative"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert not optimizer.state


@on_devices
def test_a_parameter_whose_memory_was_freed(backend: str) -> None:
    good, p = Parameter(torch.ones(2)), Parameter(torch.ones(3))
    optimizer = AdamW([good, p], lr=0.1, backend=backend)
    good.grad, p.grad = torch.ones(2), torch.ones(3)
    memory = p.untyped_storage()
    memory.resize_(0)
    with pytest.raises(BackendError, match=r"'group 0, parameter 1' has no memory of its own"):
        optimizer.step()
    assert torch.equal(good, torch.ones(2))
    assert not optimizer.state
    memory.resize_(12)
    with torch.no_grad():
        p.fill_(1.0)
    optimizer.step()
    assert float(p.detach().max()) < 1.0


@on_devices
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(
    ("param", "grad", "says"),
    [
        (torch.bfloat16, torch.float16, r"a pair that the {} backend does not take"),
        (torch.float32, torch.float64, r"a pair that the {} backend does not take"),
        (torch.float32, torch.float8_e5m2, r"has dtype torch.float8_e5m2, which the {} backend"),
    ],
)
def test_gradients_of_dtypes_that_kernels_lack(
    param: torch.dtype, grad: torch.dtype, says: str, backend: str
) -> None:
    good, p = Parameter(torch.ones(2)), Parameter(torch.ones(3, dtype=param))
    p.grad_dtype = grad
    optimizer = ClipSGD([good, p], lr=0.1, momentum=0.9, backend=backend)
    good.grad, p.grad = torch.ones(2), torch.ones(3).to(grad)
    before = snapshot(optimizer)
    with pytest.raises(BackendError, match=says.format(backend)):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert not optimizer.state
