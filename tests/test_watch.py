"""What tells engines written in Python, and the CUDA backend, that all is where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pysmooth import _cpu

KEY = "momentum_buffer"


class Watched:
    """Parameters with gradients and a state each, and a watch of them."""

    def __init__(self, *params: Tensor, aligns: bool = True) -> None:
        self.params = [Parameter(p) for p in params]
        for p in self.params:
            p.grad = torch.ones_like(p)
        self.state: dict[Any, Any] = {p: {KEY: torch.zeros_like(p)} for p in self.params}
        self.groups = [{"params": self.params[:1]}, {"params": self.params[1:]}]
        self.watch = _cpu.Watch(
            params=self.params,
            grads=[p.grad for p in self.params],
            state_dicts=[self.state[p] for p in self.params],
            state_keys=[(KEY,)] * len(self.params),
            state=self.state,
            roots=[self.state[p][KEY] for p in self.params],
            aligns=aligns,
        )

    def look(self) -> list[int] | None:
        found = self.watch.look(self.groups, self.state)
        return None if found is None else memoryview(found).cast("q").tolist()

    @property
    def addresses(self) -> list[int]:
        return [0 if p.grad is None or not p.numel() else p.grad.data_ptr() for p in self.params]


@pytest.fixture(params=[True, False], ids=["direct", "by-objects"], autouse=True)
def _direct(request: pytest.FixtureRequest) -> Iterator[None]:
    _cpu.set_direct_enabled(request.param)
    yield
    _cpu.set_direct_enabled(True)


def mixed() -> Watched:
    shapes = ((33,), (4, 5), (), (1,), (0,), (2, 1, 3, 1, 2, 2))
    return Watched(*map(torch.randn, shapes), torch.randn(3, dtype=torch.complex64))


def test_it_finds_gradients_wherever_they_are() -> None:
    w = mixed()
    assert w.look() == w.addresses
    for p in w.params:
        p.grad = torch.zeros_like(p)
    w.params[1].grad = None
    assert w.look() == w.addresses
    assert w.look()[1] == 0  # type: ignore[index]


def test_more_parameters_than_are_asked_for_at_once() -> None:
    w = Watched(*(torch.randn(3) for _ in range(100)))
    assert w.look() == w.addresses
    w.state[w.params[70]][KEY] = torch.zeros(3)
    assert w.look() is None


def _other_parameter(w: Watched) -> None:
    w.groups[1]["params"] = [Parameter(p) for p in w.params[1:]]


def _one_less(w: Watched) -> None:
    w.groups[1]["params"].pop()


def _one_more(w: Watched) -> None:
    w.groups[1]["params"].append(Parameter(torch.ones(1)))


def _moved(w: Watched) -> None:
    w.params[0].data = w.params[0].data.clone()


def _swapped(w: Watched) -> None:
    torch.utils.swap_tensors(w.params[0], Parameter(w.params[0].detach().clone()))


def _other_state(w: Watched) -> None:
    w.state[w.params[1]][KEY] = torch.zeros(4, 5)


def _other_dict(w: Watched) -> None:
    w.state[w.params[1]] = dict(w.state[w.params[1]])


def _no_state(w: Watched) -> None:
    del w.state[w.params[1]][KEY]


def _turned_state(w: Watched) -> None:
    w.state[w.params[1]][KEY].t_()


def _other_dtype(w: Watched) -> None:
    w.params[0].grad = None
    w.params[0].grad_dtype = torch.bfloat16
    w.params[0].grad = torch.ones(33, dtype=torch.bfloat16)


def _other_strides(w: Watched) -> None:
    w.params[1].grad = torch.ones(5, 4).t()


def _unaligned(w: Watched) -> None:
    w.params[0].grad = torch.ones(34)[1:]


def _lazy(w: Watched) -> None:
    w.params[-1].grad = torch.ones(3, dtype=torch.complex64).conj()


@pytest.mark.parametrize(
    "change",
    [
        *(_other_parameter, _one_less, _one_more, _moved, _swapped),
        *(_other_state, _other_dict, _no_state, _turned_state, _other_strides, _unaligned, _lazy),
    ],
    ids=lambda change: change.__name__,
)
def test_it_sees_what_changed(change: Callable[[Watched], None]) -> None:
    w = mixed()
    assert w.look() is not None
    change(w)
    assert w.look() is None


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch has no grad_dtype")
def test_it_sees_another_dtype() -> None:
    w = mixed()
    _other_dtype(w)
    assert w.look() is None


def test_boundaries_matter_only_to_those_who_say_so() -> None:
    w = Watched(torch.randn(33), aligns=False)
    _unaligned(w)
    assert w.look() == w.addresses


def test_one_that_lacks_states_is_to_have_no_gradient() -> None:
    (p,) = params = [Parameter(torch.ones(2))]
    state: dict[Any, Any] = {}
    groups = [{"params": params}]
    watch = _cpu.Watch(
        params=[p],
        grads=[None],
        state_dicts=[{}],
        state_keys=[(KEY,)],
        state=state,
        roots=[],
        aligns=False,
    )
    assert watch.look(groups, state) == bytes(8)
    p.grad = torch.ones(2)
    assert watch.look(groups, state) is None


def test_autograd_is_told_of_what_was_written() -> None:
    w = mixed()
    w.params[1].grad = None
    tensors = [*w.params, *(held[KEY] for held in w.state.values())]
    before = [t._version for t in tensors]
    assert w.look() is not None
    w.watch.count_written()
    told = [t._version - b for t, b in zip(tensors, before, strict=True)]
    assert told == [int(i != 1) for i in range(len(tensors))]
