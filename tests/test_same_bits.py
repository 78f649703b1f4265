"""Determinism: the same bits for any number of threads, instruction set, alignment and reader."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pysmooth
from pysmooth import _cpu

SIZES = [(300, 401), (7,), (), (65_537,), (64,), (0,), (3, 4, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), _cpu.isa()
    yield
    torch.set_num_threads(threads)
    _cpu.set_isa(isa)
    _cpu.set_dlpack_enabled(True)
    _cpu.set_direct_enabled(True)


def run(dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    """Three steps with everything in them; all results, as bytes would compare."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> Tensor:
        n = torch.Size(shape).numel()
        flat = torch.zeros(n + offset, dtype=dtype)
        view = flat[offset:].view(shape)
        return view.copy_(torch.randn(shape, generator=generator))

    params = [torch.nn.Parameter(make(s)) for s in SIZES]
    optimizer = pysmooth.ClipSGD(
        params, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, max_norm=1.0, backend="cpu"
    )
    out: list[Tensor] = []
    for _ in range(3):
        for p in params:
            p.grad = make(tuple(p.shape))
        optimizer.step()
        norm = optimizer.last_norm()
        assert norm is not None
        out.append(norm)
        grads = [p.grad for p in params if p.grad is not None]
        for order in (1.0, float("inf"), 3.0):
            out.append(pysmooth.get_total_norm(grads, order))
    return (
        out
        + [p.detach() for p in params]
        + [s["momentum_buffer"] for s in optimizer.state.values()]
    )


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    serial = run(dtype)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same(run(dtype), serial)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype: torch.dtype) -> None:
    _cpu.set_isa("baseline")
    baseline = run(dtype)
    for isa in _cpu.isa_levels():
        _cpu.set_isa(isa)
        assert _cpu.isa() == isa
        assert_same(run(dtype), baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(dtype: torch.dtype) -> None:
    aligned = run(dtype)
    for offset in (1, 3):
        assert_same(run(dtype, offset), aligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_of_reading_tensors(dtype: torch.dtype) -> None:
    assert _cpu.uses_direct()
    assert _cpu.uses_dlpack()
    direct = run(dtype)
    _cpu.set_direct_enabled(False)
    assert not _cpu.uses_direct()
    assert_same(run(dtype), direct)
    _cpu.set_dlpack_enabled(False)
    assert not _cpu.uses_dlpack()
    assert_same(run(dtype), direct)


def test_errors_are_the_same_in_every_way() -> None:
    def message(make: torch.Tensor) -> str:
        p = torch.nn.Parameter(torch.zeros(4, 2))
        p.grad = make
        with pytest.raises((ValueError, TypeError)) as caught:
            pysmooth.ClipSGD([p], 0.1, backend="cpu").step()
        return str(caught.value)

    sparse = torch.sparse_coo_tensor([[1], [0]], [1.0], (4, 2), check_invariants=True)
    first = message(sparse)
    _cpu.set_direct_enabled(False)
    assert message(sparse) == first
    _cpu.set_dlpack_enabled(False)
    assert message(sparse) == first


def test_isa_from_the_environment() -> None:
    code = "import torch; from pysmooth import _cpu; print(_cpu.isa())"

    def python(isa: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYSMOOTH_ISA": isa}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert python("baseline").stdout.strip() == "baseline"
    bad = python("mmx")
    assert bad.returncode != 0
    assert "PYSMOOTH_ISA=mmx" in bad.stderr


def test_kernels_of_higher_levels_share_no_inline_function_with_lower_ones() -> None:
    # The linker keeps one copy of an inline function: it must never be AVX-512 code that baseline
    # callers get. So a level's object may define no weak symbol outside of its own namespace.
    from pathlib import Path

    objects = sorted(Path(__file__).parent.parent.glob("build/pysmooth._cpu-*/*.avx*.o"))
    if not objects:
        pytest.skip("no object files: the extension was built elsewhere, or not for x86-64")
    for path in objects:
        if path.name.split(".")[0] not in ("reduce", "source", "apply", "staging", "draw", "probe"):
            continue
        symbols = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        level = path.name.split(".")[1]
        weak = [s for s in symbols.splitlines() if " W " in s or " V " in s or " u " in s]
        assert [s for s in weak if f"pysmooth::{level}::" not in s and "DW.ref" not in s] == []
