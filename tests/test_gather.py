"""Many tensors, asked by all threads: what changed among them is noticed, whoever looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pysmooth import AdamW, NonFiniteGradientError, _cpu

COUNT, SIZE = 600, 20  # more than csrc/cpu/run.h: kManyTensors; blocks enough for everybody
CHANGED = (0, 63, 64, 301, COUNT - 1)


@pytest.fixture(autouse=True)
def _team() -> Iterator[None]:
    torch.set_num_threads(4)
    yield
    _cpu.set_direct_enabled(True)


class Model:
    """Parameters of which no two are alike, and gradients that depend on the step alone."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [
            Parameter(torch.randn(SIZE, generator=generator)) for _ in range(COUNT - 2)
        ] + [
            Parameter(torch.randn(1, generator=generator)),
            Parameter(torch.randn(SIZE, dtype=torch.complex64, generator=generator)),
        ]
        self.optimizer = AdamW(self.params, 0.01, max_norm=1.0, backend="cpu")

    def grads(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in self.params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)

    def step(self, step: int) -> None:
        self.grads(step)
        self.optimizer.step()


Change = Callable[[Model, int], None]


def moved(model: Model, i: int) -> None:
    model.params[i].data = model.params[i].detach().clone()


def restrided(model: Model, i: int) -> None:
    p = model.params[i]
    p.data = torch.empty(2 * p.numel(), dtype=p.dtype)[::2].copy_(p.detach())


def state_replaced(model: Model, i: int) -> None:
    state = model.optimizer.state[model.params[i]]
    state["exp_avg"] = state["exp_avg"].clone()


def state_moved(model: Model, i: int) -> None:
    state = model.optimizer.state[model.params[i]]
    state["exp_avg_sq"].data = state["exp_avg_sq"].clone()


def dict_replaced(model: Model, i: int) -> None:
    p = model.params[i]
    model.optimizer.state[p] = {key: x.clone() for key, x in model.optimizer.state[p].items()}


def swapped(model: Model, i: int) -> None:
    p = model.params[i]
    torch.utils.swap_tensors(p, Parameter(p.detach().clone()))


CHANGES: list[Change] = [
    *(moved, restrided, state_replaced, state_moved, dict_replaced, swapped),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changed_is_noticed(change: Change) -> None:
    model, twin = Model(), Model()
    for k in range(3):
        model.step(k)
        twin.step(k)
    for i in CHANGED:
        if change is swapped:
            model.params[i].grad = None
        change(model, i)
        model.step(3 + i)
        twin.step(3 + i)
    for p, q in zip(model.params, twin.params, strict=True):
        assert torch.equal(p, q)


def strided(grad: Tensor) -> Tensor:
    return torch.empty(3 * grad.numel(), dtype=grad.dtype)[::3].copy_(grad)


def lazy(grad: Tensor) -> Tensor:
    """The same values, of which memory holds the negated or conjugated ones."""
    if grad.is_complex():
        return grad.conj().clone().conj()
    return torch.complex(torch.zeros_like(grad), -grad).conj().imag


@pytest.mark.parametrize("form", [strided, lazy])
@pytest.mark.parametrize("which", [CHANGED, range(COUNT)], ids=["some", "all"])
def test_gradients_of_another_form(form: Callable[[Tensor], Tensor], which: Any) -> None:
    model, twin = Model(), Model()
    for k in range(4):
        model.grads(k)
        if k % 2 == 1:
            for i in which:
                grad = model.params[i].grad
                assert grad is not None
                model.params[i].grad = form(grad)
                assert torch.equal(model.params[i].grad.resolve_neg(), grad)
        model.optimizer.step()
        twin.step(k)
    for p, q in zip(model.params, twin.params, strict=True):
        assert torch.equal(p, q)


def test_gradients_that_are_not_there() -> None:
    model, alone = Model(), Model()
    for k in range(6):
        for threads, m in ((4, model), (1, alone)):
            torch.set_num_threads(threads)
            m.grads(k)
            for i in range(0 if k % 3 else COUNT, COUNT, k + 1):
                m.params[i].grad = None
            m.optimizer.step()
    for p, q in zip(model.params, alone.params, strict=True):
        assert torch.equal(p, q)
        assert model.optimizer.state[p]["step"] == alone.optimizer.state[q]["step"]


@pytest.mark.parametrize("direct", [True, False])
def test_every_write_counts_once(direct: bool) -> None:
    _cpu.set_direct_enabled(direct)
    model = Model()
    idle = model.params[100]
    before = [p._version for p in model.params]
    for k in range(3):
        model.grads(k)
        idle.grad = None
        model.optimizer.step()
    for p, version in zip(model.params, before, strict=True):
        assert p._version == version + (0 if p is idle else 3)


@pytest.mark.parametrize("i", CHANGED)
def test_a_bad_gradient_among_good_ones(i: int) -> None:
    model = Model()
    model.step(0)
    model.grads(1)
    p = model.params[i]
    assert p.grad is not None
    p.grad = p.grad.to_sparse()
    kept = [q.detach().clone() for q in model.params]
    versions = [q._version for q in model.params]
    with pytest.raises(ValueError, match=rf"parameter {i}' has layout torch.sparse"):
        model.optimizer.step()
    assert all(torch.equal(q, old) for q, old in zip(model.params, kept, strict=True))
    assert versions == [q._version for q in model.params]
    model.step(2)  # and goes on


def test_a_refused_step_counts_no_write() -> None:
    model = Model()
    optimizer = AdamW(model.params, 0.01, max_norm=1.0, nonfinite="raise", backend="cpu")
    model.grads(0)
    grad = model.params[77].grad
    assert grad is not None
    grad[3] = torch.inf
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert not any(p._version for p in model.params)
