"""The same bits however the work is shared out, at sizes and in layouts that share it differently.

Small lists of plain tensors: test_same_bits.py.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import pysmooth
from pysmooth import _cpu

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    isa = _cpu.isa()
    yield
    _cpu.set_isa(isa)
    _cpu.set_dlpack_enabled(True)
    _cpu.set_direct_enabled(True)


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        x, y = (torch.view_as_real(t) if t.is_complex() else t for t in (x, y))
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
        assert torch.equal(x.contiguous().view(integer), y.contiguous().view(integer))


def train(make: Callable[[torch.Generator], list[Tensor]], steps: int = 2) -> list[Tensor]:
    """Clipped steps and clips in place; everything that comes out of them."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(p) for p in make(generator)]
    optimizer = pysmooth.ClipSGD(
        params, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, max_norm=1.0, backend="cpu"
    )
    out: list[Tensor] = []
    for _ in range(steps):
        grads = make(generator)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        norm, coefs = optimizer.last_norm(), optimizer.last_clip_coef()
        assert norm is not None
        assert coefs is not None
        out += [norm, coefs, pysmooth.clip_grad_norm_(params, 0.5), *grads]
    out += [p.detach() for p in params]
    return out + [state["momentum_buffer"] for state in optimizer.state.values()]


# Above 2^22 elements threads take chunks as they get to them; below, each has its share.
LARGE = [(2100, 2000), (70_001,), (5,), (300, 501)]


def large(dtype: torch.dtype) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda generator: [torch.randn(s, generator=generator).to(dtype) for s in LARGE]


def strange(generator: torch.Generator) -> list[Tensor]:
    """Layouts that are walked element by element, dtypes mixed, complex among them."""

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        values(200, 301).t(),
        values(90, 401)[:, ::3],
        values(40, 50, 60).permute(2, 0, 1).bfloat16(),
        values(300, 200).half()[1:, 3:],
        torch.complex(values(100, 90), values(100, 90))[:, ::2],
        values(33_000, 2).double()[:, 1],
        values(0, 4),
        values(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_models_on_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    serial = train(large(dtype), steps=1)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(train(large(dtype), steps=1), serial)


def test_run_to_run() -> None:
    torch.set_num_threads(2)
    first = train(large(torch.float32), steps=1)
    for _ in range(3):
        assert_same_bits(train(large(torch.float32), steps=1), first)


def test_many_tiny_tensors_on_any_number_of_threads() -> None:
    def tiny(generator: torch.Generator) -> list[Tensor]:
        sizes = [1 + (37 * i) % 61 for i in range(1500)]
        return [torch.randn(n, generator=generator) for n in sizes]

    torch.set_num_threads(1)
    serial = train(tiny)
    for threads in (2, 3, 5, 64):
        torch.set_num_threads(threads)
        assert_same_bits(train(tiny), serial)


def test_strange_layouts_on_any_number_of_threads() -> None:
    torch.set_num_threads(1)
    serial = train(strange)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(train(strange), serial)


def test_strange_layouts_at_every_instruction_set_and_with_every_reader() -> None:
    _cpu.set_isa("baseline")
    baseline = train(strange)
    for isa in _cpu.isa_levels():
        _cpu.set_isa(isa)
        for direct, dlpack in ((True, True), (False, True), (False, False)):
            _cpu.set_direct_enabled(direct)
            _cpu.set_dlpack_enabled(dlpack)
            assert (_cpu.uses_direct(), _cpu.uses_dlpack()) == (direct, dlpack)
            assert_same_bits(train(strange), baseline)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), -float("inf"), 0.0, 0.5, 3.0, -1.0])
def test_norms_at_every_instruction_set(dtype: torch.dtype, norm_type: float) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (1, 63, 64, 65, 8191, 8193, 32_769)]
    tensors += [torch.randn(9000).mul(1e-22).to(dtype), torch.randn(9000).exp().to(dtype)]
    norms = set()
    for isa in _cpu.isa_levels():
        _cpu.set_isa(isa)
        for threads in (1, 2, 3):
            norms.add(_cpu.grad_norm(tensors, norm_type, threads)[0])  # the double: all its bits
    assert len(norms) == 1


def test_layout_and_order_of_work_do_not_change_a_norm() -> None:
    # Chunks are cut by element number in the tensor's own memory order, dense or not.
    x = torch.randn(300, 401)
    expected = _cpu.grad_norm([x], 2.0, 1)[0]
    wide = torch.zeros(300, 401, 2)[..., 0].copy_(x)
    assert _cpu.grad_norm([wide], 2.0, 2)[0] == expected
    assert _cpu.grad_norm([x.t()], 2.0, 2)[0] == expected
    assert _cpu.grad_norm([x.view(-1)], 2.0, 3)[0] == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_at_any_address(dtype: torch.dtype) -> None:
    def at(offset: int) -> list[Tensor]:
        def make(generator: torch.Generator) -> list[Tensor]:
            out = []
            for n in (1, 7, 65, 40_000):
                view = torch.zeros(n + offset, dtype=dtype)[offset:]
                out.append(view.copy_(torch.randn(n, generator=generator)))
            return out

        return train(make)

    aligned = at(0)
    for offset in (1, 2, 5, 13):
        assert_same_bits(at(offset), aligned)


def test_a_plan_serves_gradients_that_move() -> None:
    # The same step from gradients at new addresses as from gradients that stay.
    def run(fresh: bool) -> list[Tensor]:
        p = Parameter(torch.ones(1000))
        p.grad = torch.zeros(1000)
        optimizer = pysmooth.ClipSGD([p], 0.1, momentum=0.9, max_norm=1.0, backend="cpu")
        generator = torch.Generator().manual_seed(3)
        kept = []
        for _ in range(5):
            value = torch.randn(1000, generator=generator)
            if fresh:
                kept.append(p.grad)  # so that no address comes back
                p.grad = value
            else:
                p.grad.copy_(value)
            optimizer.step()
        return [p.detach()]

    assert_same_bits(run(True), run(False))


# ---- the reader of older torch versions ----------------------------------------------------------


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(4, 2)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


STRANGERS: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "meta": lambda: torch.zeros(4, 2, device="meta"),
    "fake": fake,
    "nested": nested,
    "integer": lambda: torch.zeros(4, 2, dtype=torch.int64),
    "boolean": lambda: torch.zeros(4, 2, dtype=torch.bool),
    "float8": lambda: torch.zeros(4, 2).to(torch.float8_e4m3fn),
    "a number": lambda: 3.0,
    "None": lambda: None,
    "an array": lambda: __import__("numpy").zeros(3),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype
def test_both_readers_refuse_alike(name: str) -> None:
    if name == "an array":
        pytest.importorskip("numpy")
    stranger = STRANGERS[name]()
    said = []
    for dlpack in (True, False):
        _cpu.set_dlpack_enabled(dlpack)
        with pytest.raises((TypeError, ValueError)) as caught:
            _cpu.grad_norm([torch.ones(3), stranger], 2.0, 1)
        assert "gradient 1" in str(caught.value)
        said.append(caught.type)
    assert said[0] is said[1]


@pytest.mark.parametrize("dlpack", [True, False])
def test_both_readers_take_the_same_tensors(dlpack: bool) -> None:
    _cpu.set_dlpack_enabled(dlpack)
    tensors = [
        torch.ones(0),
        torch.ones(()),
        torch.ones(3, requires_grad=True),
        Parameter(torch.ones(2, 2)),
        torch.ones(10)[7:],
        torch.ones(4, 4)[::2, 1::2],
        torch.ones(1).expand(6),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.zeros(1, dtype=torch.complex64).sub(1j).conj().imag,
        torch.ones((1,) * 9),
    ]
    assert sum(t.numel() for t in tensors) == 25
    assert _cpu.grad_norm(tensors, 2.0, 1)[0] == 5.0


# ---- choosing the instruction set ----------------------------------------------------------------


def test_environment_variable_in_use() -> None:
    code = """
import os, torch, pysmooth
from pysmooth import _cpu
p = torch.nn.Parameter(torch.ones(100))
p.grad = torch.ones(100)
calls = [
    lambda: pysmooth.clip_grad_norm_([p], 1.0),
    lambda: pysmooth.ClipSGD([p], 0.1, max_norm=1.0).step(),
    _cpu.isa,
    _cpu.rules,
]
for call in calls:
    try:
        call()
        print("no error")
    except ValueError as error:
        print(error)
print(p.grad.sum().item(), p.sum().item())
os.environ["PYSMOOTH_ISA"] = "baseline"
print("after", torch.ones(1).item())
"""
    env = {**os.environ, "PYSMOOTH_ISA": "AVX2 "}  # levels are lower-case, without spaces
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    message = "PYSMOOTH_ISA=AVX2 : unknown, or not supported by this CPU"
    assert all(line.startswith(message) for line in lines[:4])
    assert "levels: baseline, avx2, avx512" in lines[0]
    assert lines[4] == "100.0 100.0"


# ---- more elements than a 32-bit number counts ---------------------------------------------------

FAR = 2**31 + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_of_more_than_2_to_the_31_expanded_elements(dtype: torch.dtype) -> None:
    norm = pysmooth.get_total_norm([torch.ones(1, dtype=dtype).expand(FAR)])
    assert float(norm) == pytest.approx(FAR**0.5, rel=1e-6)


def test_norm_finds_elements_far_out_in_linear_memory() -> None:
    # Zeros that nobody wrote are pages that nobody has: 4 GiB of addresses, not of memory.
    x = torch.frombuffer(mmap.mmap(-1, 2 * FAR), dtype=torch.bfloat16)
    x[2**31 - 1], x[2**31 + 1], x[FAR - 1] = 1.0, 2.0, 2.0
    assert pysmooth.get_total_norm([x]) == 3.0
    assert pysmooth.get_total_norm([x[2**31 :]], float("inf")) == 2.0
