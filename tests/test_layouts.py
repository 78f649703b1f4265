"""Strange layouts against torch.optim.SGD, step after step, and what lies beside them in memory.

Each pair of the usual layouts: test_memory_layouts.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import total_norm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pysmooth

SETTINGS = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}


def against_torch(
    params: list[Tensor],
    grads: Callable[[int, Tensor], Tensor],
    steps: int = 3,
    lay_state: Callable[[Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> list[Parameter]:
    """Steps both optimizers on the same values; torch gets contiguous copies. Compares all."""
    settings = {**SETTINGS, **kwargs}
    ours = [Parameter(p) for p in params]
    for p, q in zip(ours, params, strict=True):
        assert p.stride() == q.stride()
    theirs = [Parameter(p.clone(memory_format=torch.contiguous_format)) for p in params]
    optimizer = pysmooth.ClipSGD(ours, 0.1, **settings, backend="cpu")
    twin = torch.optim.SGD(theirs, 0.1, **settings, foreach=False)
    for step in range(steps):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = grads(i, p)
            value = p.grad.resolve_conj().resolve_neg()
            q.grad = value.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        twin.step()
        if lay_state is not None and step == 0:
            for state in optimizer.state.values():
                state["momentum_buffer"] = lay_state(state["momentum_buffer"])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
        if settings["momentum"] and q.numel():
            buffers = (optimizer.state[p], twin.state[q])
            torch.testing.assert_close(*(state["momentum_buffer"] for state in buffers))
    return ours


def normal(_: int, p: Tensor) -> Tensor:
    return torch.randn(p.shape, dtype=p.dtype)


def shuffled(x: Tensor, rng: random.Random, gap: int = 1) -> Tensor:
    """The same values with the dimensions in another order in memory, `gap` elements apart."""
    order = list(range(x.dim()))
    rng.shuffle(order)
    inverse = [order.index(d) for d in range(x.dim())]
    wide = torch.full((*(x.shape[d] for d in order), gap), 55.0, dtype=x.dtype)
    view: Tensor = wide[..., gap // 2].permute(inverse)
    return view.copy_(x)


# ---- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_permutations(order: tuple[int, ...]) -> None:
    p = torch.randn(5, 4, 3, 2).permute(order)
    against_torch([p], normal)  # contiguous gradients
    against_torch([p], lambda _, q: torch.randn(2, 3, 4, 5).permute(3, 2, 1, 0).permute(order))


def test_six_dimensions() -> None:
    rng = random.Random(0)
    params = [shuffled(torch.randn(2, 3, 1, 4, 2, 3), rng) for _ in range(4)]
    against_torch(params, lambda _, p: shuffled(torch.randn(p.shape), rng))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "form"),
    [((6, 5, 4, 3), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
def test_channels_last(dtype: torch.dtype, shape: tuple[int, ...], form: Any) -> None:
    def make() -> Tensor:
        return torch.randint(-4, 5, shape).to(dtype) / 4  # exact whatever the dtype

    for of_param, of_grad in itertools.product((form, torch.contiguous_format), repeat=2):
        start, grads = make(), [make(), make()]
        p = Parameter(start.clone(memory_format=of_param))
        optimizer = pysmooth.ClipSGD([p], 0.5, momentum=0.5, backend="cpu")
        for grad in grads:
            p.grad = grad.contiguous(memory_format=of_grad)
            optimizer.step()
        expected = start - 0.5 * grads[0] - 0.5 * (0.5 * grads[0] + grads[1])
        assert torch.equal(p, expected)
        assert p.is_contiguous(memory_format=of_param)
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.is_contiguous(memory_format=of_param)
        assert torch.equal(buffer.to(dtype), 0.5 * grads[0] + grads[1])


def test_convolution_trained_in_channels_last() -> None:
    def train(make: Callable[..., torch.optim.Optimizer], form: Any) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
        ).to(memory_format=form)
        x = torch.randn(2, 3, 9, 9).contiguous(memory_format=form)
        optimizer = make(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().contiguous().view(-1) for p in model.parameters()])

    expected = train(lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), torch.contiguous_format)
    for form in (torch.contiguous_format, torch.channels_last):
        actual = train(lambda ps: pysmooth.ClipSGD(ps, 0.1, momentum=0.9, backend="cpu"), form)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_lies_differently_in_every_step() -> None:
    rng = random.Random(1)
    p = torch.randn(4, 5, 6)
    against_torch([p], lambda _, q: shuffled(torch.randn(q.shape), rng, rng.randint(1, 3)), 8)


ODD_ONES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "row": ((1, 7), (1000, 1)),
    "column": ((7, 1), (1, 1)),
    "stride 0": ((7, 1), (1, 0)),
    "all ones": ((1, 1, 1), (9, 0, 77)),
    "between": ((3, 1, 4), (4, 123, 1)),
    "transposed": ((3, 1, 4), (1, 123, 3)),
    "one element": ((1,), (5,)),
    "no dimension": ((), ()),
}


@pytest.mark.parametrize("of_grad", [True, False])
@pytest.mark.parametrize("name", ODD_ONES)
def test_strides_of_dimensions_of_one(name: str, of_grad: bool) -> None:
    shape, strides = ODD_ONES[name]
    storage = torch.randn(5000)
    p = storage.as_strided(shape, strides)

    def grad(_: int, q: Tensor) -> Tensor:
        plain = torch.randn(q.shape)
        return torch.randn(5000).as_strided(shape, strides) if of_grad else plain

    against_torch([p], grad)


# ---- not dense -----------------------------------------------------------------------------------

SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "[..., 0]": lambda x: x[..., 0],
    "[:, ::3]": lambda x: x[:, ::3],
    "[1:, 2:5]": lambda x: x[1:, 2:5],
    "[::2, ::2, ::2]": lambda x: x[::2, ::2, ::2],
    "[3]": lambda x: x[3],
    "[:, 4]": lambda x: x[:, 4],
    "transposed [:, 1:]": lambda x: x.transpose(0, 2)[:, 1:],
    "diagonal": lambda x: x.diagonal(),
    "real": lambda x: torch.complex(x, x).real,
    "imag": lambda x: torch.complex(x, x).imag,
}


@pytest.mark.parametrize("of_grad", SLICES)
@pytest.mark.parametrize("of_param", SLICES)
def test_slices(of_param: str, of_grad: str) -> None:
    outer = torch.randn(6, 9, 7)
    view = SLICES[of_param](outer)
    owner = outer if view._base is None or view._base.is_complex() else view._base
    untouched = torch.ones_like(owner, dtype=torch.bool)
    if not of_param.startswith(("real", "imag")):
        SLICES[of_param](untouched).fill_(False)
    before = owner.clone()

    def grad(_: int, p: Tensor) -> Tensor:
        if of_grad == of_param:
            return SLICES[of_grad](torch.randn(6, 9, 7))
        return torch.randn((*p.shape, 2))[..., 1]

    against_torch([view], grad)
    assert torch.equal(owner[untouched], before[untouched])


def test_interleaved_views_of_one_storage() -> None:
    both = torch.randn(7, 5, 3)
    views = [both[..., 0], both[..., 1], both[..., 2]]
    against_torch(views, normal)
    z = torch.randn(9, dtype=torch.complex64)
    against_torch([z.real, z.imag], normal)
    matrix = torch.randn(20, 30)
    against_torch([matrix[:, :10], matrix[:, 10:]], normal)
    against_torch([matrix[::2], matrix[1::2]], normal)


def test_many_columns_of_one_matrix() -> None:
    # As of a fused projection: slices whose spans all intersect.
    matrix = torch.randn(64, 300)
    against_torch(list(matrix.split(3, dim=1)), normal)


@pytest.mark.parametrize("expanded", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_expanded_gradients(expanded: tuple[int, ...]) -> None:
    shape = (5, 6, 7)
    inner = tuple(1 if d in expanded else n for d, n in enumerate(shape))
    grad = torch.randn(inner).expand(shape)
    for p in (torch.randn(shape), torch.randn(7, 6, 5).permute(2, 1, 0)):
        (q,) = against_torch([p], lambda *_: grad)
        assert q.stride() == p.stride()
    norm = pysmooth.get_total_norm([grad])
    torch.testing.assert_close(norm.double(), grad.double().norm(), rtol=2e-7, atol=0)


def test_gradient_of_a_sum_is_expanded() -> None:
    p = Parameter(torch.randn(4, 5))
    p.sum().backward()
    assert p.grad is not None
    p.grad = p.grad.sum().expand(4, 5)
    before = p.detach().clone()
    pysmooth.ClipSGD([p], 0.1, max_norm=1.0, clip_eps=0.0, backend="cpu").step()
    torch.testing.assert_close(p.detach(), before - 0.1 / math.sqrt(20))


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0])
def test_norms_of_any_layout(order: float) -> None:
    x = torch.randn(30, 40, 50)
    views = [
        x,
        x.permute(2, 0, 1),
        x[:, ::3],
        x[..., 1],
        x[0, 0, 0],
        x[:, :0],
        x[0, 0].expand(200, 50),
        x.view(-1).unfold(0, 16, 3),  # windows that overlap may be read
        torch.complex(x, x).imag,
    ]
    for view in views:
        got = float(pysmooth.get_total_norm([view], order))
        expected = float(pysmooth.get_total_norm([view.contiguous()], order))
        assert got == pytest.approx(expected, rel=1e-6)
    dense = [v.double() for v in views if v.numel()]
    expected_all = float(total_norm(dense, order))
    assert float(pysmooth.get_total_norm(views, order)) == pytest.approx(expected_all, rel=1e-6)


# ---- empty ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 2])
def test_empty_tensors_of_any_strides(at: int) -> None:
    empties = [
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.empty(0, 4).t(),
        torch.randn(4, 4)[:, 2:2],
    ]
    for empty in empties:
        params = [torch.randn(3), torch.randn(4)]
        params.insert(at, empty)
        against_torch(params, normal)


EXPANDED_EMPTIES: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.empty(0).expand(3, 0),
    "columns": lambda: torch.empty(0, 1).expand(0, 5),
    "windows": lambda: torch.randn(9).unfold(0, 3, 1)[:, :0],
}


@pytest.mark.parametrize("name", EXPANDED_EMPTIES)
def test_an_empty_tensor_does_not_overlap_itself(name: str) -> None:
    p, other = Parameter(EXPANDED_EMPTIES[name]()), Parameter(torch.zeros(4))
    p.grad, other.grad = EXPANDED_EMPTIES[name](), torch.ones(4)
    assert float(pysmooth.clip_grad_norm_([p, other], 1.0)) == 2.0
    torch.testing.assert_close(other.grad, torch.full((4,), 0.5))
    pysmooth.ClipSGD([p, other], 1.0, momentum=0.9, backend="cpu").step()
    torch.testing.assert_close(other.detach(), torch.full((4,), -0.5))


# ---- complex, conjugated, negated ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_layouts(dtype: torch.dtype) -> None:
    rng = random.Random(2)
    params = [
        torch.randn(5, 4, 3, dtype=dtype).permute(2, 0, 1),
        torch.randn(6, 8, dtype=dtype)[:, ::2],
        torch.randn((), dtype=dtype),
        torch.randn(0, 2, dtype=dtype),
    ]
    grads: list[Callable[[Tensor], Tensor]] = [
        lambda p: torch.randn(p.shape, dtype=dtype),
        lambda p: torch.randn(p.shape, dtype=dtype).conj(),
        lambda p: shuffled(torch.randn(p.shape, dtype=dtype), rng, 2),
        lambda p: shuffled(torch.randn(p.shape, dtype=dtype), rng).conj(),
        lambda p: torch.randn((), dtype=dtype).conj().expand(p.shape),
    ]
    for grad in grads:
        start = [shuffled(p, rng) for p in params]
        against_torch(start, lambda _, p, grad=grad: grad(p))  # type: ignore[misc]


def test_complex_clip_coefficient() -> None:
    p = Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.tensor([3 + 0j, 4j]).conj()
    optimizer = pysmooth.ClipSGD([p], 1.0, max_norm=1.0, clip_eps=0.0, backend="cpu")
    optimizer.step()
    assert optimizer.last_norm() == 5.0
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6 + 0j, 0.8j]))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000])
@pytest.mark.parametrize("of_param", ["dense", "imag"])
def test_negated_gradients(of_param: str, n: int) -> None:
    def grad(_: int, p: Tensor) -> Tensor:
        out = torch.randn(p.shape, dtype=torch.complex64).conj().imag
        assert out.is_neg()
        return out

    p = torch.randn(n)
    if of_param == "imag":  # the same strides as the gradient's
        p = torch.complex(p, p).imag
    against_torch([p], grad)


def test_negated_gradient_that_is_dense() -> None:
    # Nothing in the strides of a single element tells that it is a view with a negative sign.
    def grad(_: int, p: Tensor) -> Tensor:
        out = torch.randn(p.shape, dtype=torch.complex64).conj().imag
        assert out.is_neg()
        assert out.is_contiguous()
        return out

    against_torch([torch.randn(1)], grad)


def test_clipping_negated_and_conjugated_gradients_in_place() -> None:
    z, x = Parameter(torch.zeros(3, dtype=torch.complex64)), Parameter(torch.zeros(4))
    z.grad = torch.randn(3, dtype=torch.complex64).conj()
    x.grad = torch.randn(4, dtype=torch.complex64).conj().imag
    before = [z.grad.clone(), x.grad.clone()]
    norm = pysmooth.clip_grad_norm_([z, x], 0.5)
    for grad, old in zip((z.grad, x.grad), before, strict=True):
        torch.testing.assert_close(grad, old * (0.5 / (norm + 1e-6)))


# ---- many dimensions, many elements --------------------------------------------------------------


def test_many_dimensions() -> None:
    def spread(ndim: int) -> Tensor:
        # Every dimension has a gap of its own, so no two of them merge.
        strides = [3**d for d in reversed(range(ndim))]
        size = sum(strides) + 1
        return torch.zeros(size).as_strided((2,) * ndim, strides)

    deep = torch.randn((2,) * 12).permute(*reversed(range(12)))
    against_torch([deep], normal)
    merging = torch.randn((2,) * 18).permute(*range(9, 18), *range(9))  # two runs, after merging
    against_torch([merging], lambda _, p: torch.randn(p.shape).permute(*range(18)))
    gaps = spread(16)
    against_torch([gaps], lambda _, p: torch.ones(p.shape))


def test_too_many_dimensions_are_refused_by_name() -> None:
    shape = (1,) * 3 + (2,) * 17
    order = list(range(20))
    random.Random(0).shuffle(order)
    p = Parameter(torch.zeros(shape))
    p.grad = torch.ones(tuple(shape[d] for d in order)).permute([order.index(d) for d in range(20)])
    optimizer = pysmooth.ClipSGD([("w", p)], 1.0, backend="cpu")
    try:
        optimizer.step()
    except ValueError as error:
        assert "'w' has more than 16 dimensions that cannot be merged" in str(error)  # noqa: PT017
        assert torch.count_nonzero(p) == 0
    else:
        assert torch.equal(p, -torch.ones(shape))


def test_offsets_beyond_32_bits() -> None:
    # The storage is only reserved: no more than a few of its pages are ever touched.
    far = 2**31
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.empty(2 * far + 9, dtype=dtype)[::far]
        g = torch.empty(2 * far + 9, dtype=dtype)[4::far]
        assert p.shape == g.shape == (3,)
        p.copy_(torch.tensor([1.0, 2.0, 3.0]))
        g.copy_(torch.tensor([4.0, 8.0, -8.0]))
        assert pysmooth.get_total_norm([g]) == 12.0
        q = Parameter(p)
        q.grad = g
        pysmooth.ClipSGD([q], 0.5, max_norm=6.0, clip_eps=0.0, backend="cpu").step()
        assert torch.equal(q, torch.tensor([0.0, 0.0, 5.0], dtype=dtype))


# ---- anything ------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 5), max_size=6),
    rng=st.randoms(use_true_random=False),
    gaps=st.tuples(*[st.integers(1, 3)] * 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_random_layouts_of_parameter_gradient_and_momentum(
    shape: list[int],
    rng: random.Random,
    gaps: tuple[int, int, int],
    dtype: torch.dtype,
    momentum: float,
) -> None:
    against_torch(
        [shuffled(torch.randn(shape, dtype=dtype), rng, gaps[0]), torch.randn(3)],
        lambda _, p: shuffled(torch.randn(p.shape, dtype=p.dtype), rng, gaps[1]),
        lay_state=lambda m: shuffled(m, rng, gaps[2]),
        momentum=momentum,
        nesterov=momentum > 0,
    )


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rng=st.randoms(use_true_random=False),
    gap=st.integers(1, 3),
    order=st.sampled_from([2.0, 1.0, math.inf, 3.0]),
)
def test_clipping_in_place_with_random_strides(
    shape: list[int], rng: random.Random, gap: int, order: float
) -> None:
    x = torch.randn(shape)
    p = Parameter(torch.zeros(shape))
    p.grad = shuffled(x, rng, gap)
    norm = pysmooth.clip_grad_norm_([p], 1e-3, order)
    torch.testing.assert_close(norm.double(), torch.linalg.vector_norm(x.double(), order))
    torch.testing.assert_close(p.grad, x * (1e-3 / (norm + 1e-6)))
    owner = p.grad._base
    if owner is not None and gap > 1:  # the gaps still hold what they held
        assert int((owner == 55.0).sum()) == owner.numel() - x.numel()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_overlap_that_spans_as_much_as_it_has_elements(backend: Any) -> None:
    """Eight from the first to the last: 3 and 4 are there twice, 2 and 5 never."""
    p = Parameter(torch.zeros(8).as_strided((2, 2, 2), (3, 3, 1)))
    p.grad = torch.ones(2, 2, 2)
    with pytest.raises(ValueError, match="overlaps itself"):
        pysmooth.ClipSGD([p], 0.1, backend=backend).step()
    assert not p.any()
