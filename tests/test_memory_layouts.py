"""Any layout: the step is the same function of the values, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pysmooth

LR, MOMENTUM = 0.25, 0.5

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every third": lambda x: _inside(
        x, lambda s: (*s[:-1], 3 * s[-1]), (..., slice(None, None, 3))
    ),
    "last of two": lambda x: _inside(x, lambda s: (*s, 2), (..., 1)),
    "window": lambda x: _inside(
        x, lambda s: tuple(n + 2 for n in s), tuple(slice(1, n + 1) for n in x.shape)
    ),
}


def _inside(x: Tensor, outer: Callable[[torch.Size], tuple[int, ...]], at: object) -> Tensor:
    """The values of x, in a view of something larger."""
    view: Tensor = torch.full(outer(x.shape), 77.0, dtype=x.dtype)[at]
    return view.copy_(x)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    # Eighths: exact in every step of the formula below, so results compare to the bit.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator) / 8


def leaf(x: Tensor) -> Tensor:
    p = torch.nn.Parameter(x.detach())
    assert p.stride() == x.stride()
    return p


@pytest.mark.parametrize("of_state", ["contiguous", "reversed"])
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_every_combination(of_param: str, of_grad: str, of_state: str) -> None:
    shape = (3, 4, 5, 6)
    start, first, second = (values(shape, seed) for seed in range(3))
    p = leaf(LAYOUTS[of_param](start))
    optimizer = pysmooth.ClipSGD([p], LR, momentum=MOMENTUM, max_norm=float("inf"), backend="cpu")
    p.grad = LAYOUTS[of_grad](first)
    optimizer.step()
    assert torch.equal(p, start - LR * first)
    buffer = LAYOUTS[of_state](optimizer.state[p]["momentum_buffer"])
    optimizer.state[p]["momentum_buffer"] = buffer
    p.grad = LAYOUTS[of_grad](second)
    optimizer.step()
    momentum = MOMENTUM * first + second
    assert torch.equal(p, start - LR * first - LR * momentum)
    assert torch.equal(buffer, momentum)
    norm = optimizer.last_norm()
    assert norm is not None
    torch.testing.assert_close(norm, second.norm())
    if p._base is None and not p.is_contiguous():
        assert p.stride() == LAYOUTS[of_param](start).stride()


@pytest.mark.parametrize("of_grad", ["reversed", "every third", "last of two", "window"])
def test_clipping_in_place_writes_only_the_gradient(of_grad: str) -> None:
    x = values((3, 4, 5, 6), 0)
    p = leaf(torch.zeros(3, 4, 5, 6))
    p.grad = LAYOUTS[of_grad](x)
    outside = p.grad._base
    total = None if outside is None else outside.sum() - p.grad.sum()
    norm = pysmooth.clip_grad_norm_([p], 1.0)
    torch.testing.assert_close(p.grad, x / (norm + 1e-6))
    if outside is not None and total is not None:
        torch.testing.assert_close(outside.sum() - p.grad.sum(), total)


def test_expanded_gradient() -> None:
    p = leaf(values((4, 6), 0))
    before = p.detach().clone()
    p.grad = torch.arange(4.0).reshape(4, 1).expand(4, 6)
    optimizer = pysmooth.ClipSGD([p], LR, max_norm=float("inf"), backend="cpu")
    optimizer.step()
    assert torch.equal(p, before - LR * p.grad)
    norm = optimizer.last_norm()
    assert norm is not None
    torch.testing.assert_close(norm, torch.tensor((6 * 14.0) ** 0.5))


def test_two_interleaved_parameters_of_one_storage() -> None:
    both = values((10, 2), 0)
    before = both.clone()
    params = [leaf(both[..., 0]), leaf(both[..., 1])]
    for p in params:
        p.grad = torch.ones(10)
    pysmooth.ClipSGD(params, LR, momentum=MOMENTUM, backend="cpu").step()
    assert torch.equal(both, before - LR)


@pytest.mark.parametrize("where", ["first", "middle", "last", "all"])
def test_empty_tensors(where: str) -> None:
    shapes = {
        "first": [(0,), (3,), (4,)],
        "middle": [(3,), (0, 5), (4,)],
        "last": [(3,), (4,), (2, 0)],
        "all": [(0,), (0, 2)],
    }[where]
    params = [leaf(torch.zeros(s)) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = pysmooth.ClipSGD(params, 1.0, momentum=0.9, max_norm=1e9, backend="cpu")
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(p, torch.full_like(p, -2.9)) for p in params)
    norm = optimizer.last_norm()
    assert norm is not None
    torch.testing.assert_close(norm, torch.tensor(float(sum(p.numel() for p in params)) ** 0.5))


def test_conjugated_and_negated_gradients() -> None:
    z = torch.nn.Parameter(torch.zeros(6, dtype=torch.complex64))
    z.grad = torch.randn(6, dtype=torch.complex64).conj()
    assert z.grad.is_conj()
    one = torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.randn(1, dtype=torch.complex64).conj().imag
    many = torch.nn.Parameter(torch.zeros(5))
    many.grad = torch.randn(5, dtype=torch.complex64).conj().imag
    assert one.grad.is_neg()
    assert many.grad.is_neg()
    params = [z, one, many]
    pysmooth.ClipSGD(params, 1.0, backend="cpu").step()
    for p in params:
        assert p.grad is not None
        assert torch.equal(p.detach(), -p.grad.resolve_conj().resolve_neg())


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=6),
    orders=st.tuples(*(st.randoms(use_true_random=False) for _ in range(2))),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_random_strides(shape: list[int], orders: tuple, steps: tuple[int, int]) -> None:
    def lay(x: Tensor, order: object, gap: int) -> Tensor:
        dims = list(range(x.dim()))
        order.shuffle(dims)  # type: ignore[attr-defined]
        shuffled = x.permute(dims)
        inverse = [dims.index(d) for d in range(x.dim())]
        wide = torch.zeros((*shuffled.shape, gap))[..., 0].copy_(shuffled)
        return wide.permute(inverse)

    start, grad = values(tuple(shape), 0), values(tuple(shape), 1)
    p = leaf(lay(start, orders[0], steps[0]))
    p.grad = lay(grad, orders[1], steps[1])
    pysmooth.ClipSGD([p], LR, momentum=MOMENTUM, max_norm=float("inf"), backend="cpu").step()
    assert torch.equal(p, start - LR * grad)
