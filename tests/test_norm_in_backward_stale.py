"""norm="in_backward": sums of gradients that changed, or were made in several passes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from backward import Params, Row, backward, full, pair
from battery import assert_same_bits, record_grads

import pysmooth
from pysmooth import ClipSGD

# ---- gradients that change after backward -------------------------------------------------------


def in_place(ps: Params) -> None:
    ps[0].grad.mul_(3.0)


def behind_the_counter(ps: Params) -> None:
    ps[0].grad.data.mul_(3.0)


def through_numpy(ps: Params) -> None:
    ps[4].grad.numpy()[...] *= 3.0


def replaced(ps: Params) -> None:
    ps[0].grad = ps[0].grad * 3.0


def replaced_where_it_was(ps: Params) -> None:
    """A new tensor in the same memory, as an allocator may give it, at the same version."""
    at, version = ps[4].grad.data_ptr(), ps[4].grad._version
    memory = ps[4].grad.numpy()
    ps[4].grad = None
    memory *= 3.0
    ps[4].grad = torch.from_numpy(memory)
    assert (ps[4].grad.data_ptr(), ps[4].grad._version) == (at, version)


def deleted(ps: Params) -> None:
    ps[0].grad = None


def of_another_form(ps: Params) -> None:
    ps[0].grad = ps[0].grad.t().contiguous().t()


def memory_swapped(ps: Params) -> None:
    ps[0].grad.data = ps[0].grad.data * 3.0


def clipped_by_torch(ps: Params) -> None:
    torch.nn.utils.clip_grad_norm_(ps, 0.1)


def clipped_by_pysmooth(ps: Params) -> None:
    pysmooth.clip_grad_norm_(ps, 0.1)


def zeroed(ps: Params) -> None:
    for p in ps:
        p.grad.zero_()


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (in_place, 5),
        (behind_the_counter, 0),
        (through_numpy, 0),
        (replaced, 5),
        (replaced_where_it_was, 5),
        (deleted, 5),
        (of_another_form, 5),
        (memory_swapped, 5),
        (clipped_by_torch, 0),
        (clipped_by_pysmooth, 0),
        (zeroed, 0),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_changed_gradient_is_read_again(change: Callable[[Params], None], kept: int) -> None:
    ours, optimizer, plain, reference = pair()
    for i, row in enumerate(record_grads(ours, 3)):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad()
            backward(params, row)
            if i == 1:
                change(params)
            o.step()
        assert optimizer.sums_from_backward() == (kept if i == 1 else full(ours))
        assert_same_bits([optimizer.last_norm()], [reference.last_norm()])
    assert_same_bits(ours, plain)


@pytest.mark.parametrize("leading", [0.0, -0.0])
def test_scaling_shows_behind_leading_zeros(leading: float) -> None:
    """As in an embedding's gradient, whose first rows were not used."""
    gradient = torch.full((70_000,), leading)
    gradient[30_000:30_010] = gradient[69_000:] = 1.0
    p = torch.nn.Parameter(torch.zeros(70_000))
    optimizer = ClipSGD([p], 0.1, max_norm=1.0, norm="in_backward")
    for factor in (1.0, 2.0):
        p.grad = None
        (p * gradient).sum().backward()
        p.grad.data.mul_(factor)
        optimizer.step()
        assert optimizer.sums_from_backward() == (factor == 1.0)
        norm = float(factor * torch.linalg.vector_norm(gradient.double()))
        assert float(optimizer.last_norm()) == pytest.approx(norm, rel=1e-6)


def test_a_hook_of_the_user_after_ours() -> None:
    ours, optimizer, plain, reference = pair()
    for p in (ours[0], plain[0]):
        p.register_post_accumulate_grad_hook(lambda q: in_place([q]))
    for row in record_grads(ours, 2):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad()
            backward(params, row)
            o.step()
    assert optimizer.sums_from_backward() == full(ours) - 1
    assert_same_bits(ours, plain)


# ---- several backward passes --------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients(set_to_none: bool) -> None:
    ours, optimizer, plain, reference = pair()
    rows = record_grads(ours, 6)
    for i in range(0, 6, 2):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad(set_to_none=set_to_none)
            backward(params, rows[i], retain_graph=True)
            backward(params, rows[i + 1])
            o.step()
        assert optimizer.sums_from_backward() == full(ours)
        assert_same_bits([optimizer.last_norm()], [reference.last_norm()])
    assert_same_bits(ours, plain)


def test_one_graph_backward_twice() -> None:
    p = torch.nn.Parameter(torch.ones(40))
    optimizer = ClipSGD([p], 0.1, max_norm=float("inf"), norm="in_backward")
    loss = (3 * p).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert optimizer.sums_from_backward() == 1
    assert float(optimizer.last_norm()) == pytest.approx(6 * 40**0.5, rel=1e-6)


def test_a_step_without_a_backward_before_it() -> None:
    """The sums are still those of the gradient that is still there."""
    ours, optimizer, plain, reference = pair()
    row = record_grads(ours, 1)[0]
    for params, o in ((ours, optimizer), (plain, reference)):
        backward(params, row)
        o.step()
        o.step()
    assert optimizer.sums_from_backward() == full(ours)
    assert_same_bits(ours, plain)


def test_parameters_outside_this_backward_pass() -> None:
    ours, optimizer, plain, reference = pair()
    rows = record_grads(ours, 4)
    for i, row in enumerate(rows):
        part = [g if (i + k) % 3 else None for k, g in enumerate(row)]
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad()
            backward(params, part)
            o.step()
        assert optimizer.sums_from_backward() == sum(g is not None and g.numel() > 0 for g in part)
    assert_same_bits(ours, plain)


def test_closure() -> None:
    ours, optimizer, plain, reference = pair()
    for row in record_grads(ours, 2):
        for params, o in ((ours, optimizer), (plain, reference)):

            def closure(params: Params = params, o: ClipSGD = o, row: Row = row) -> float:
                o.zero_grad()
                backward(params, row)
                return 1.0

            assert o.step(closure) == 1.0
        assert optimizer.sums_from_backward() == full(ours)
    assert_same_bits(ours, plain)


def test_backward_on_another_thread() -> None:
    ours, optimizer, plain, reference = pair()
    for row in record_grads(ours, 2):
        optimizer.zero_grad()
        worker = threading.Thread(target=backward, args=(ours, row))
        worker.start()
        worker.join()
        reference.zero_grad()
        backward(plain, row)
        optimizer.step()
        reference.step()
        assert optimizer.sums_from_backward() == full(ours)
    assert_same_bits(ours, plain)
