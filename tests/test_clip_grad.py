"""clip_grad_norm_ as a drop-in: what goes in, what is refused, what comes out, with any optimizer.

The norms and the scaled values themselves: test_functional.py, test_norm_edges.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from battery import CUDA_EMULATED, total_norm
from torch import Tensor
from torch.nn import Parameter, utils

import pysmooth
from pysmooth.engine import backends

ORDERS = [2.0, 1.0, math.inf, -math.inf, 0.0, 0.5, 3.0, -1.0]


def param(grad: Tensor) -> Parameter:
    """A parameter with this gradient."""
    p = Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    p.grad = grad
    return p


def mixed() -> list[Parameter]:
    """Gradients of every dtype, layout and size, some of them missing or empty."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.01

    return [
        param(values(40, 33).float()),
        Parameter(torch.zeros(3)),
        param(values(257).bfloat16()),
        param(values(0)),
        param(values(5, 7).half().t()),
        param(values(9, 2)[:, 0]),
        param(values().float()),
    ]


def grads(params: list[Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


EMULATED = pytest.mark.skipif(not CUDA_EMULATED, reason="PYSMOOTH_EMULATED=1 is not set")


@pytest.fixture(
    params=[
        "native",
        "torch ops",
        pytest.param("cuda", marks=[pytest.mark.emulated, EMULATED]),
    ]
)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native module, as on a machine where it could not be built, and as on a GPU."""
    if request.param == "cuda":
        from simt import emulated

        emulated.take_cpu_tensors(monkeypatch)
    if request.param == "torch ops":
        monkeypatch.setattr(backends, "_load_native", lambda: "no compiler")
    return str(request.param)


# ---- the result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", ORDERS)
def test_mixed_list_against_torch_in_float64(path: str, norm_type: float) -> None:
    ours, theirs = mixed(), [param(g.double()) for g in grads(mixed()) if g.numel()]
    max_norm = 0.7 * float(total_norm(grads(theirs), norm_type))
    norm = pysmooth.clip_grad_norm_(ours, max_norm, norm_type)
    expected = utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for g, h in zip([g for g in grads(ours) if g.numel()], grads(theirs), strict=True):
        # One rounding of the scaled value; the coefficient has the norm's error.
        eps = torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.double(), h, rtol=max(eps, 2e-6), atol=1e-7)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(path: str, dtype: torch.dtype, norm_type: float) -> None:
    ours = [param(torch.randn(s, dtype=dtype)) for s in [(9, 5), (3,), ()]]
    theirs = [param(g.to(torch.complex128, copy=True)) for g in grads(ours)]
    max_norm = 0.5 * float(total_norm(grads(theirs), norm_type))
    norm = pysmooth.clip_grad_norm_(ours, max_norm, norm_type)
    expected = utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert norm.dtype == (torch.float32 if dtype == torch.complex64 else torch.float64)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    for g, h in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(g.to(torch.complex128), h, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_gradients_has_float32_accuracy(path: str, dtype: torch.dtype) -> None:
    p = param(torch.randn(100_000).to(dtype))
    assert p.grad is not None
    exact = p.grad.double().norm()
    rtol = 2e-7 if path == "native" else 1e-5  # torch's own float32 sum
    torch.testing.assert_close(pysmooth.clip_grad_norm_(p, 1e9).double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_finite_float16_gradients_have_a_finite_norm(path: str, norm_type: float) -> None:
    p = param(torch.full((1000,), 60000.0, dtype=torch.float16))
    norm = pysmooth.clip_grad_norm_(p, 1.0, norm_type, error_if_nonfinite=True)
    assert float(norm) == pytest.approx(60000.0 * 1000 ** (1 / norm_type), rel=1e-6)
    assert p.grad is not None
    assert torch.count_nonzero(p.grad) == 1000


@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_nonfinite_as_torch(path: str, norm_type: float, bad: float, where: int) -> None:
    def make() -> list[Parameter]:
        params = [p for p in mixed() if p.dtype == torch.float32 or p.grad is None]
        params = [*params, param(torch.ones(70)), param(torch.ones(3))]
        grad = grads(params)[min(where, len(grads(params)) - 1)]
        grad.view(-1)[-1] = bad
        return params

    ours, theirs = make(), make()
    norm = pysmooth.clip_grad_norm_(ours, 1.0, norm_type)
    expected = utils.clip_grad_norm_(theirs, 1.0, norm_type)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    assert not math.isfinite(norm)
    for g, h in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(g, h, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_error_if_nonfinite_changes_nothing(path: str, dtype: torch.dtype) -> None:
    ours = [param(torch.ones(5, dtype=dtype)), param(torch.ones(70, dtype=dtype))]
    grads(ours)[1][66] = math.nan
    before = [g.clone() for g in grads(ours)]
    versions = [g._version for g in grads(ours)]
    message = r"total norm of order 2.0 for gradients is non-finite"
    with pytest.raises(RuntimeError, match=message):
        pysmooth.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=message):
        pysmooth.get_total_norm(grads(ours), error_if_nonfinite=True)
    for g, b in zip(grads(ours), before, strict=True):
        torch.testing.assert_close(g, b, rtol=0, atol=0, equal_nan=True)
    assert [g._version for g in grads(ours)] == versions


def test_error_if_nonfinite_goes_by_the_norm_that_is_returned(path: str) -> None:
    # Finite elements whose norm no float32 can hold.
    p = param(torch.full((4,), 3e38))
    with pytest.raises(RuntimeError, match="non-finite"):
        pysmooth.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad is not None
    assert torch.equal(p.grad, torch.full((4,), 3e38))


# ---- the arguments -------------------------------------------------------------------------------


CONTAINERS: dict[str, Callable[[list[Parameter]], object]] = {
    "list": lambda ps: ps,
    "tuple": tuple,
    "generator": lambda ps: (p for p in ps),
    "dict values": lambda ps: dict(enumerate(ps)).values(),
    "iterator": iter,
    "ParameterList": torch.nn.ParameterList,
    "module": lambda ps: torch.nn.ParameterList(ps).parameters(),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_containers(path: str, container: str, foreach: bool | None) -> None:
    params = [param(torch.full((3,), 2.0)), param(torch.full((4,), 1.0))]
    norm = pysmooth.clip_grad_norm_(CONTAINERS[container](params), 1.0, foreach=foreach)  # type: ignore[arg-type]
    assert float(norm) == 4.0
    torch.testing.assert_close(params[0].grad, torch.full((3,), 0.5))
    total = pysmooth.get_total_norm(grads(params), foreach=foreach)
    torch.testing.assert_close(total, torch.tensor(1.0))
    again = CONTAINERS[container](params)
    pysmooth.clip_grads_with_norm_(again, 0.5, total, foreach=foreach)  # type: ignore[arg-type]
    torch.testing.assert_close(params[1].grad, torch.full((4,), 0.125))


def test_single_tensor(path: str) -> None:
    p = param(torch.tensor([3.0, 4.0]))
    assert p.grad is not None
    assert float(pysmooth.get_total_norm(p.grad)) == 5.0
    assert float(pysmooth.clip_grad_norm_(p, 1.0)) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    pysmooth.clip_grads_with_norm_(p, 1.0, torch.tensor(4.0))
    torch.testing.assert_close(p.grad, torch.tensor([0.15, 0.2]))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, -math.inf, 0.0])
def test_nothing_there(path: str, norm_type: float) -> None:
    none = Parameter(torch.zeros(3))
    for params in ([], (), [none], [none, none], none):
        norm = pysmooth.clip_grad_norm_(params, 1.0, norm_type)
        assert norm == 0
        assert norm.shape == ()
        pysmooth.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0))
    assert none.grad is None
    assert pysmooth.get_total_norm([], norm_type) == 0
    assert pysmooth.clip_grad_norm_([param(torch.ones(0, 3))], 1.0, norm_type) == 0


def test_empty_generator_warns_and_an_empty_list_does_not(path: str) -> None:
    with pytest.warns(
        UserWarning, match="empty generator, no gradient clipping will occur"
    ) as seen:
        assert pysmooth.clip_grad_norm_((p for p in ()), 1.0) == 0
    assert seen[0].filename == __file__  # the caller's line, not pysmooth's
    assert pysmooth.clip_grad_norm_([], 1.0) == 0


def test_max_norm_may_be_a_tensor_or_zero_or_infinite(path: str) -> None:
    p = param(torch.tensor([3.0, 4.0]))
    assert p.grad is not None
    pysmooth.clip_grad_norm_(p, math.inf)
    assert torch.equal(p.grad, torch.tensor([3.0, 4.0]))
    pysmooth.clip_grad_norm_(p, torch.tensor(2.5))  # type: ignore[arg-type]
    torch.testing.assert_close(p.grad, torch.tensor([1.5, 2.0]))
    pysmooth.clip_grad_norm_(p, 0.0)
    assert torch.equal(p.grad, torch.zeros(2))
    pysmooth.clip_grad_norm_(p, 0.0)  # 0 / (0 + 1e-6)
    assert torch.equal(p.grad, torch.zeros(2))


@pytest.mark.parametrize("max_norm", [-1e-9, -math.inf, math.nan])
def test_bad_max_norm(path: str, max_norm: float) -> None:
    p = param(torch.ones(3))
    with pytest.raises(ValueError, match="max_norm must be at least 0; got"):
        pysmooth.clip_grad_norm_([p], max_norm)
    with pytest.raises(ValueError, match="max_norm must be at least 0; got"):
        pysmooth.clip_grads_with_norm_([p], max_norm, torch.tensor(2.0))
    assert p.grad is not None
    assert torch.equal(p.grad, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_total_norm_of_any_dtype(path: str, dtype: torch.dtype) -> None:
    p = param(torch.ones(3))
    pysmooth.clip_grads_with_norm_([p], 1.0, torch.tensor(4.0, dtype=dtype))
    torch.testing.assert_close(p.grad, torch.full((3,), 0.25), rtol=1e-5, atol=0)


def test_total_norm_that_requires_grad(path: str) -> None:
    p = param(torch.ones(3))
    pysmooth.clip_grads_with_norm_([p], 1.0, torch.tensor(4.0, requires_grad=True))
    torch.testing.assert_close(p.grad, torch.full((3,), 0.25))
    assert p.grad is not None
    assert not p.grad.requires_grad


# ---- what is refused leaves everything as it was -------------------------------------------------


def sparse() -> Tensor:
    return torch.sparse_coo_tensor([[1], [0]], [1.0], (4, 2), check_invariants=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_sparse_gradients(path: str, dtype: torch.dtype, norm_type: float) -> None:
    params = [param(torch.ones(9, dtype=dtype)), param(sparse().to(dtype))]
    calls: list[Callable[[], object]] = [
        lambda: pysmooth.clip_grad_norm_(params, 0.1, norm_type),
        lambda: pysmooth.get_total_norm(grads(params), norm_type),
        lambda: pysmooth.clip_grads_with_norm_(params, 0.1, torch.tensor(9.0)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"gradient 1 has layout torch\.sparse_coo"):
            call()
    assert torch.equal(grads(params)[0], torch.ones(9, dtype=dtype))


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_expanded_gradient_is_measured_but_not_scaled(
    path: str, dtype: torch.dtype, norm_type: float
) -> None:
    params = [param(torch.ones(2, dtype=dtype)), param(torch.ones(1, dtype=dtype).expand(14))]
    norm = pysmooth.get_total_norm(grads(params), norm_type)
    assert float(norm) == 16 ** (1 / norm_type)
    if path != "cuda":  # which would have to wait to know whether there is anything to scale
        assert pysmooth.clip_grad_norm_(params, 100.0, norm_type) == norm
    calls: list[Callable[[], object]] = [
        lambda: pysmooth.clip_grad_norm_(params, 0.1, norm_type),
        lambda: pysmooth.clip_grads_with_norm_(params, 0.1, torch.tensor(9.0)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="gradient 1 overlaps itself"):
            call()
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads(params))


SHARED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "same tensor": lambda: (lambda g: (g, g))(torch.ones(6)),
    "same memory": lambda: (lambda g: (g, g.view(2, 3)))(torch.ones(6)),
    "part": lambda: (lambda g: (g, g[5:]))(torch.ones(6)),
    "overlapping windows": lambda: (lambda g: (g[:6], g[4:]))(torch.ones(10)),
    "columns": lambda: (lambda g: (g[:, :2], g[:, 1:]))(torch.ones(4, 3)),
    "complex and its parts": lambda: (lambda g: (g, g.imag))(torch.ones(5, dtype=torch.complex64)),
}


@pytest.mark.parametrize("how", SHARED)
def test_gradients_that_share_memory(path: str, how: str) -> None:
    a, b = SHARED[how]()
    params = [param(torch.ones(1)), param(a), param(b)]
    before = [g.clone() for g in grads(params)]
    with pytest.raises(ValueError, match="gradients 1 and 2 share memory"):
        pysmooth.clip_grad_norm_(params, 0.1)
    assert all(torch.equal(g, h) for g, h in zip(grads(params), before, strict=True))


def test_gradients_of_one_buffer_that_do_not_share_an_element(path: str) -> None:
    flat = torch.ones(4, 3)
    params = [param(flat[:, 0]), param(flat[:, 1:]), param(torch.ones(4, 2)[..., 1])]
    pysmooth.clip_grad_norm_(params, 2.0)
    torch.testing.assert_close(flat, torch.full((4, 3), 0.5))


def test_things_that_are_no_tensors(path: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        pysmooth.get_total_norm([torch.ones(2), 3.0])  # type: ignore[list-item]
    with pytest.raises((TypeError, AttributeError)):
        pysmooth.clip_grad_norm_([param(torch.ones(2)), "w"], 1.0)  # type: ignore[list-item]


# ---- autograd ------------------------------------------------------------------------------------


def test_unclipped_gradients_are_not_written(path: str) -> None:
    if path == "torch ops":
        pytest.skip("torch ops multiply by one")
    params = mixed()
    grads(params)[0].view(-1)[0] = -0.0
    bits = [g.clone() for g in grads(params)]
    versions = [g._version for g in grads(params)]
    norm = pysmooth.clip_grad_norm_(params, 1e6)
    if path == "cuda":  # the host does not know
        assert [g._version - v for g, v in zip(grads(params), versions, strict=True)] == [1] * 6
    else:
        pysmooth.clip_grads_with_norm_(params, 1e6, norm)
        assert [g._version for g in grads(params)] == versions
    for g, b in zip(grads(params), bits, strict=True):
        assert torch.equal(g, b)
        assert torch.equal(g.signbit(), b.signbit())


def test_a_later_backward_notices_that_gradients_were_clipped(path: str) -> None:
    p = param(torch.full((3,), 2.0))
    weight = torch.ones(3, requires_grad=True)
    product = (weight * p.grad).sum()  # keeps the gradient for the backward pass
    pysmooth.clip_grad_norm_(p, 1e6 if path == "native" else math.inf)
    if path == "native":
        product.backward(retain_graph=True)  # nothing was clipped: nothing changed
    pysmooth.clip_grad_norm_(p, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_gradients_with_a_graph(path: str, dtype: torch.dtype, norm_type: float) -> None:
    # backward(create_graph=True) leaves gradients that require gradients.
    leaf = param(torch.ones(4, dtype=dtype).requires_grad_())
    inner = param(torch.ones(5, dtype=dtype).requires_grad_() * 1)
    norm = pysmooth.clip_grad_norm_([leaf, inner], 0.9, norm_type)
    assert float(norm) == 9 ** (1 / norm_type)
    assert not norm.requires_grad
    coef = 0.9 / float(norm)
    for g in grads([leaf, inner]):
        assert g.requires_grad
        torch.testing.assert_close(
            g.detach(), torch.full(g.shape, coef, dtype=dtype), rtol=1e-2, atol=0
        )
    assert not pysmooth.get_total_norm(grads([leaf, inner]), norm_type).requires_grad


def test_in_inference_mode(path: str) -> None:
    with torch.inference_mode():
        p = param(torch.tensor([3.0, 4.0]))
        assert float(pysmooth.clip_grad_norm_([p], 1.0)) == 5.0
        torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))


def test_the_norm_is_where_the_gradients_are(path: str) -> None:
    # torch.set_default_device(...) is about the user's tensors, not about this result.
    p = param(torch.ones(4))
    assert p.grad is not None
    with torch.device("meta"):
        norms = [
            pysmooth.clip_grad_norm_([p], 0.5),
            pysmooth.clip_grad_norm_([p], 0.5, 3.0),
            pysmooth.get_total_norm([p.grad]),
        ]
    assert [norm.device.type for norm in norms] == ["cpu"] * 3


# ---- beside the optimizers of torch --------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Iterator[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True),
    "SGD fused": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, fused=True),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, 0.1, foreach=True),
    "Adam": lambda ps: torch.optim.Adam(ps, 0.01),
    "Adam fused": lambda ps: torch.optim.Adam(ps, 0.01, fused=True),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, 0.01, foreach=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.01),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01),
    "NAdam": lambda ps: torch.optim.NAdam(ps, 0.01),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, 0.1),
    "ASGD": lambda ps: torch.optim.ASGD(ps, 0.01),
    "ClipSGD": lambda ps: pysmooth.ClipSGD(ps, 0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_one_changed_import(name: str) -> None:
    def train(clip: Callable[..., Tensor]) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 3)
        )
        x, y = torch.randn(64, 8), torch.randn(64, 3)
        optimizer = OPTIMIZERS[name](model.parameters())
        norms = []
        for _ in range(20):
            optimizer.zero_grad()
            (20 * (model(x) - y).square().mean()).backward()
            norms.append(float(clip(model.parameters(), 5.0)))
            optimizer.step()
        return norms, [p.detach() for p in model.parameters()]

    (ours, our_params), (theirs, their_params) = (
        train(pysmooth.clip_grad_norm_),
        train(utils.clip_grad_norm_),
    )
    assert max(ours) > 5  # something was clipped
    assert ours == pytest.approx(theirs, rel=1e-4)
    for p, q in zip(our_params, their_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
