"""The helpers of all tests: backends, parameters and gradients, an oracle, comparisons."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from registry import REGISTRY, Entry, Kwargs
from torch import Tensor

from pysmooth.engine.backends import triton_interpreted

# Under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors: conftest.py then keeps the tests
# of that backend, and they take fewer steps.
# Under PYSMOOTH_EMULATED=1 the CUDA kernels do (tests/simt), and conftest.py keeps that backend's.
CUDA_EMULATED = os.environ.get("PYSMOOTH_EMULATED") == "1"
DEVICE_BACKENDS = ("triton",) * triton_interpreted() + ("cuda",) * CUDA_EMULATED
BACKENDS = ("cpu", "eager", *DEVICE_BACKENDS)
STEPS, EXAMPLES = (3, 3) if triton_interpreted() else (20, 20)

# Entries that stand for all others in the interpreter: with a norm, with counted steps, with a norm
# that accumulates, with a sum before the step, with a selection, with two passes.
INTERPRETED = ("clip_sgd", "adam", "m_adagrad_norm", "clip21_sgd2m", "ef_sgd", "ef21")

# What the CUDA and the Triton backend have no kernel for yet, in the words of their BackendErrors.
CUDA_LACKS: tuple[str, ...] = ()
TRITON_LACKS: tuple[str, ...] = ()

# Neither multiples of a vector width nor of each other; 5,003 elements span several chunks of work.
SHAPES = ((7, 5), (), (33,), (0, 4), (5003,), (3, 2, 3, 3), (1,))


# ---- making inputs ------------------------------------------------------------------------------


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[torch.nn.Parameter]:
    """Parameters of size about 1."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [
        torch.nn.Parameter(torch.randn(tuple(s), generator=gen, dtype=wide).to(dtype))
        for s in shapes
    ]


def record_grads(
    params: Sequence[Tensor], steps: int, seed: int = 2, dtype: torch.dtype | None = None
) -> list[list[Tensor]]:
    """Gradients for so many steps, their size varying from step to step so that clips come and go.

    They are float64 (complex128) numbers that the parameter's dtype, or `dtype`, holds exactly.
    """
    gen = torch.Generator().manual_seed(seed)
    out = []
    for step in range(steps):
        scale = (0.01, 0.1, 1.0)[step % 3]
        row = []
        for p in params:
            wide = torch.complex128 if p.is_complex() else torch.float64
            g = scale * torch.randn(p.shape, generator=gen, dtype=wide)
            row.append(g.to(dtype or p.dtype).to(wide))
        out.append(row)
    return out


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Fresh gradient tensors, in each parameter's gradient dtype, on its device."""
    for p, g in zip(params, grads, strict=True):
        if g is None:
            p.grad = None
            continue
        dtype = getattr(p, "grad_dtype", None) or p.dtype
        p.grad = g.to(p.device, dtype, copy=True)


def advance(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], rows: Iterable[Sequence[Tensor]]
) -> None:
    """One step per row of recorded gradients."""
    for row in rows:
        set_grads(params, row)
        optimizer.step()


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Exact(NamedTuple):
    """What the float64 oracle found, per parameter.

    `sizes` is, per element, the largest magnitude that the parameter or an update of it had on the
    way: errors are measured in its units in the last place. `peaks` is the largest magnitude that
    any element of a state had.
    """

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    sizes: list[Tensor]
    peaks: list[dict[str, float]]


def oracle(
    entry: Entry, kwargs: Kwargs, start: Sequence[Tensor], rows: Sequence[Sequence[Tensor]]
) -> Exact:
    """Runs the eager backend in float64 on copies of the parameters."""
    wide = [torch.nn.Parameter(p.detach().to(widest(p.dtype), copy=True)) for p in start]
    optimizer = entry.make(wide, backend="eager", **kwargs)
    keys = entry.state_keys(kwargs)
    sizes = [p.detach().abs() for p in wide]
    peaks = [dict.fromkeys(keys, 0.0) for _ in wide]
    for row in rows:
        before = [p.detach().clone() for p in wide]
        set_grads(wide, row)
        optimizer.step()
        for i, (p, b) in enumerate(zip(wide, before, strict=True)):
            moved = (p.detach() - b).abs()
            sizes[i] = torch.maximum(torch.maximum(sizes[i], p.detach().abs()), moved)
            for key in keys if p.numel() else ():
                peaks[i][key] = max(peaks[i][key], float(optimizer.state[p][key].abs().max()))
    states = [{key: optimizer.state[p][key] for key in keys} for p in wide]
    return Exact([p.detach() for p in wide], states, sizes, peaks)


# ---- comparing ----------------------------------------------------------------------------------


def widest(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128."""
    return torch.complex128 if dtype.is_complex else torch.float64


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place that `dtype` has at numbers of this size, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(size.double())
    unit = torch.ldexp(torch.full_like(size, info.eps, dtype=torch.float64), exponent - 1)
    return unit.clamp_min(info.tiny * info.eps)


def max_ulp(got: Tensor, want: Tensor, size: Tensor) -> float:
    """The largest error of `got`, in units in the last place of `size`."""
    if got.numel() == 0:
        return 0.0
    error = (got.detach().to(want.dtype) - want).abs()
    return float((error / ulp(size, got.dtype)).max())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaNs and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # A copy: one element that is no neighbour of anything counts as contiguous, and has a stride.
    dense = torch.contiguous_format
    x, y = (t.detach().clone(memory_format=dense).reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def assert_same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    """Asserts bitwise equality of two lists, saying where they differ."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert same_bits(x, y), f"tensor {i} differs: {x.detach()} against {y.detach()}"


Snapshot = tuple[list[Tensor], list[dict[str, Any]]]


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies of all parameters and of the whole state, keys included."""
    params = all_params(optimizer)
    states = [
        copy.deepcopy(dict(optimizer.state[p])) if p in optimizer.state else {} for p in params
    ]
    return [p.detach().clone() for p in params], states


def assert_same_snapshot(a: Snapshot, b: Snapshot) -> None:
    """Asserts that two snapshots are equal to the bit."""
    assert_same_bits(a[0], b[0])
    for i, (x, y) in enumerate(zip(a[1], b[1], strict=True)):
        assert x.keys() == y.keys(), f"state keys of parameter {i}: {set(x)} against {set(y)}"
        for key, value in x.items():
            if isinstance(value, Tensor):
                assert same_bits(value, y[key]), f"state {key!r} of parameter {i} differs"
            else:
                assert value == y[key], f"state {key!r} of parameter {i} differs"


def assert_unchanged(optimizer: torch.optim.Optimizer, before: Snapshot) -> None:
    """Asserts that parameters, states and state keys are, to the bit, as they were."""
    assert_same_snapshot(snapshot(optimizer), before)


def continues_alike(
    optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer, rows: list[list[Tensor]]
) -> None:
    """Both go on, and end at the same bits without having shared anything."""
    for row in rows:
        advance(optimizer, all_params(optimizer), [row])
        advance(other, all_params(other), [row])
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


# ---- parametrisation ----------------------------------------------------------------------------

every_entry = pytest.mark.parametrize("entry", REGISTRY, ids=lambda e: e.name)
# Those that a step on a device needs no number of.
every_unwaiting_entry = pytest.mark.parametrize(
    "entry", [e for e in REGISTRY if not e.waits], ids=lambda e: e.name
)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_variant = pytest.mark.parametrize(
    ("entry", "kwargs"),
    [
        pytest.param(entry, kwargs, id=f"{entry.name}-{name}")
        for entry in REGISTRY
        for name, kwargs in entry.variants.items()
    ],
)


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """torch.nn.utils.get_total_norm, which torch has from 2.6 on."""
    norms = [torch.linalg.vector_norm(t, norm_type) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)
