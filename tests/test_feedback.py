"""Error feedback and EF21: what must hold exactly, or to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from battery import (
    BACKENDS,
    advance,
    assert_same_bits,
    assert_unchanged,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import (
    EF21,
    EF21SGD2M,
    EFSGD,
    QSGD,
    Clip21,
    Clip21SGD2M,
    EF21Plus,
    HardThreshold,
    Identity,
    NaturalCompression,
    NormalizedSGD,
    RandK,
    ScaledSign,
    TopK,
)
from pysmooth.compressors import Compressor

every_backend = pytest.mark.parametrize("backend", BACKENDS)
COMPRESSORS: tuple[Compressor, ...] = (
    TopK(ratio=0.02),
    TopK(k=9),
    TopK(ratio=0.05, scope="global"),
    TopK(ratio=0.1, scope="block", block_size=32),
    RandK(ratio=0.05, seed=2**40 + 1),
    RandK(k=3, scaled=False),
    ScaledSign(),
    HardThreshold(0.07),
    QSGD(300, seed=2**40 + 1),
    NaturalCompression(seed=4),
    Identity(),
)
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
# Some tensors are sampled, some selected from as a whole.
SHAPES = ((130, 70), (33,), (), (0, 2), (257,), (20000,))

Make = Callable[..., pysmooth.optim._base.FusedOptimizer]


def train(
    make: Make, backend: str, steps: int = 4, *, rows: Sequence[Sequence[Tensor]] | None = None
) -> tuple[list[Parameter], Any]:
    params = make_params(SHAPES)
    optimizer = make(params, backend=backend)
    advance(optimizer, params, rows or record_grads(params, steps))
    return params, optimizer


def states(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [value for p in params for value in optimizer.state[p].values() if p.numel()]


@every_compressor
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (EFSGD, {}),
        (EFSGD, {"momentum": 0.9, "weight_decay": 0.01}),
        (EF21, {}),
        (EF21, {"eta": 0.3, "init": "full"}),
        (EF21, {"normalize": True, "init": "zero", "weight_decay": 0.1}),
        (EF21, {"normalize": True, "eta": 0.3}),
        (EF21SGD2M, {"eta": 0.3}),
        (EF21Plus, {"weight_decay": 0.1}),
        (EF21Plus, {"eta": 0.3, "normalize": True, "scope": "tensor"}),
    ],
)
def test_fused_equals_eager(cls: Any, kwargs: dict[str, Any], compressor: Compressor) -> None:
    """To the bit, but for sums, which add up in another order."""

    def make(params: Any, backend: str) -> Any:
        return cls(params, 0.1, compressor, backend=backend, **kwargs)

    fused, a = train(make, "cpu")
    eager, b = train(make, "eager")
    for x, y in zip(fused + states(a, fused), eager + states(b, eager), strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=2e-6, atol=2e-6)
    sums = isinstance(compressor, ScaledSign | QSGD) or kwargs.get("normalize")
    if not sums:
        assert_same_bits(states(a, fused), states(b, eager))


# ---- error feedback -----------------------------------------------------------------------------


@every_backend
@every_compressor
def test_parameter_minus_residual_follows_sgd(compressor: Compressor, backend: str) -> None:
    """Also when the learning rate changes: the residual is in the parameter's units."""
    if isinstance(compressor, RandK) and compressor.scaled:
        compressor = RandK(ratio=0.05, scaled=False)  # else no contraction: the residual explodes
    params, plain = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer = EFSGD(params, 0.1, compressor, backend=backend)
    sgd = torch.optim.SGD(plain, 0.1)
    for i, row in enumerate(record_grads(params, 6)):
        for group in (*optimizer.param_groups, *sgd.param_groups):
            group["lr"] = 0.1 / (i + 1)
        advance(optimizer, params, [row])
        advance(sgd, plain, [row])
    for p, q in zip(params, plain, strict=True):
        shadow = p.detach() - optimizer.residual(p)
        torch.testing.assert_close(shadow, q.detach(), rtol=1e-12, atol=1e-12)


@every_backend
@every_compressor
@pytest.mark.parametrize(
    "clip",
    [
        {"max_norm": 1.0},
        {"max_norm": 0.5, "clip": "smooth", "scope": "tensor"},
        {"max_norm": 0.3, "clip": "value"},
        {"clip": "agc"},
    ],
    ids=["hard", "smooth", "value", "agc"],
)
def test_parameter_minus_residual_follows_clipped_sgd(
    clip: dict[str, Any], compressor: Compressor, backend: str
) -> None:
    """The gradient is clipped, and not what the residual adds to it."""
    if isinstance(compressor, RandK) and compressor.scaled:
        compressor = RandK(ratio=0.05, scaled=False)
    params, plain = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer = EFSGD(params, 0.1, compressor, backend=backend, **clip)
    sgd = pysmooth.ClipSGD(plain, 0.1, backend="eager", **clip)
    for row in record_grads(params, 4):
        for p, q in zip(params, plain, strict=True):
            q.data.copy_(p.detach())  # agc looks at the parameter
        shadows = [p.detach() - optimizer.residual(p) for p in params]
        before = [q.detach().clone() for q in plain]
        advance(optimizer, params, [row])
        advance(sgd, plain, [row])
        for p, q, shadow, b in zip(params, plain, shadows, before, strict=True):
            expected = shadow + (q.detach() - b)
            found = p.detach() - optimizer.residual(p)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_backend
@every_compressor
def test_lr_zero_sends_nothing(compressor: Compressor, backend: str) -> None:
    params = make_params(SHAPES)
    optimizer = EFSGD(params, 0.1, compressor, backend=backend)
    rows = record_grads(params, 3)
    advance(optimizer, params, rows[:2])
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    kept = [optimizer.residual(p) for p in params]
    advance(optimizer, params, rows[2:])
    assert_same_bits(params, before)
    assert_same_bits([optimizer.residual(p) for p in params], kept)


@every_backend
@pytest.mark.parametrize("lr_of_other", [0.0, 0.3])
def test_groups_share_one_global_selection(backend: str, lr_of_other: float) -> None:
    a, b = Parameter(torch.zeros(4)), Parameter(torch.zeros(2))
    optimizer = EFSGD(
        [{"params": [a]}, {"params": [b], "lr": lr_of_other}],
        0.1,
        TopK(k=2, scope="global"),
        backend=backend,
    )
    set_grads([a, b], [torch.tensor([1.0, 5.0, 3.0, 0.0]), torch.tensor([4.0, 0.5])])
    optimizer.step()
    if lr_of_other:
        assert torch.count_nonzero(a) == 1
        assert b.tolist() == pytest.approx([-1.2, 0])
    else:
        assert a.tolist() == pytest.approx([0, -0.5, -0.3, 0])
        assert b.tolist() == [0, 0]


@every_backend
@pytest.mark.parametrize("make", [EFSGD, EF21, Clip21, Clip21SGD2M])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_never_reaches_a_residual(make: Any, value: float, backend: str) -> None:
    extra = () if make in (Clip21, Clip21SGD2M) else (TopK(k=2),)
    params = make_params([(40,), (7,)])
    rows = record_grads(params, 2)
    optimizer = make(params, 0.1, *extra, backend=backend)
    zeroing = make(
        copy := make_params([(40,), (7,)]), 0.1, *extra, nonfinite="zero", backend=backend
    )
    advance(optimizer, params, rows[:1])
    advance(zeroing, copy, rows[:1])
    before = snapshot(optimizer)
    rows[1][0][3] = value
    advance(optimizer, params, rows[1:])
    assert_unchanged(optimizer, before)
    assert optimizer.skipped_steps() == 1

    advance(zeroing, copy, rows[1:])
    rows[1][0][3] = 0.0
    advance(optimizer, params, rows[1:])
    assert_same_bits(params, copy)
    assert_same_bits(states(optimizer, params), states(zeroing, copy))
    with pytest.raises(ValueError, match="nonfinite must be one of skip, raise, zero"):
        make(params, 0.1, *extra, nonfinite="propagate", backend=backend)


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_estimate_that_starts_as_the_gradient_is_finite(value: float, backend: str) -> None:
    """What the policy "zero" reads as 0 starts as 0."""
    params, copy = make_params([(40,), (7,)]), make_params([(40,), (7,)])
    (rows,) = record_grads(params, 1)
    rows[0][:9] = value  # more than the compressor mends at once
    ours = EF21(params, 0.1, TopK(k=2), init="full", nonfinite="zero", backend=backend)
    advance(ours, params, [rows])
    rows[0][:9] = 0.0
    other = EF21(copy, 0.1, TopK(k=2), init="full", nonfinite="zero", backend=backend)
    advance(other, copy, [rows])
    assert_same_bits(params, copy)
    assert_same_bits(states(ours, params), states(other, copy))


# ---- EF21 ---------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("eta", [None, 0.25])
def test_ef21_with_identity_is_sgd(eta: float | None, backend: str) -> None:
    params, plain = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer = EF21(params, 0.1, Identity(), eta=eta, init="zero", backend=backend)
    momentum = {} if eta is None else {"momentum": 1 - eta, "dampening": 1 - eta}
    sgd = torch.optim.SGD(plain, 0.1, **momentum)
    rows = record_grads(params, 5)
    if eta is not None:  # torch starts its buffer from the first gradient
        for p in plain:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    advance(optimizer, params, rows)
    advance(sgd, plain, rows)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


@every_backend
@pytest.mark.parametrize(
    "compressor", [TopK(k=5), ScaledSign(), RandK(k=7, scaled=False)], ids=repr
)
def test_normalised_steps_have_length_lr(compressor: Compressor, backend: str) -> None:
    params = make_params(SHAPES, torch.float64)
    optimizer = EF21(params, 0.3, compressor, normalize=True, backend=backend)
    for row in record_grads(params, 4):
        before = [p.detach().clone() for p in params]
        advance(optimizer, params, [row])
        moved = torch.stack(
            [(p.detach() - b).norm() for p, b in zip(params, before, strict=True)]
        ).norm()
        assert float(moved) == pytest.approx(0.3, rel=1e-9)


@every_backend
def test_norm_zero_moves_nothing(backend: str) -> None:
    for make in (
        lambda p: EF21(p, 0.3, TopK(k=1), normalize=True, backend=backend),
        lambda p: NormalizedSGD(p, 0.3, backend=backend),
    ):
        params = make_params([(5,), (3,)])
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        make(params).step()
        assert_same_bits(params, before)


@every_backend
@pytest.mark.parametrize("init", ["compressed", "full", "zero"])
def test_ef21_init(init: Any, backend: str) -> None:
    p = Parameter(torch.zeros(4))
    p.grad = torch.tensor([4.0, -3.0, 2.0, 1.0])
    optimizer = EF21([p], 1.0, TopK(k=1), eta=0.5, init=init, backend=backend)
    optimizer.step()
    estimate = optimizer.state[p]["grad_estimate"].tolist()
    momentum = optimizer.state[p]["momentum_buffer"].tolist()
    assert momentum == ([2, -1.5, 1, 0.5] if init == "zero" else [4, -3, 2, 1])
    expected = {"compressed": [4, 0, 0, 0], "full": [4, -3, 2, 1], "zero": [2, 0, 0, 0]}
    assert estimate == expected[init]
    assert p.tolist() == [-x for x in estimate]


@every_backend
def test_ef21_plus_takes_the_better_message(backend: str) -> None:
    p = Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = EF21Plus([p], 1.0, TopK(k=1), backend=backend)
    for grad, expected in (
        ([4.0, 3.0], [4.0, 0.0]),  # equal at first: EF21's
        ([4.0, 3.0], [4.0, 3.0]),  # the estimate completes itself
        ([0.0, 9.0], [0.0, 9.0]),  # top-k of the gradient itself is exact here
    ):
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        assert optimizer.state[p]["grad_estimate"].tolist() == expected


@every_backend
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_ef21_plus_chooses_per_unit(scope: Any, backend: str) -> None:
    """The first tensor wants the gradient itself, the second one the difference, by more."""
    a, b = Parameter(torch.zeros(4)), Parameter(torch.zeros(4))
    optimizer = EF21Plus([a, b], 1.0, TopK(ratio=0.25, scope=scope), init="full", backend=backend)
    set_grads([a, b], [torch.tensor([3.0, 0, 3, 0]), torch.tensor([8.0, 8, 8, 8])])
    optimizer.step()
    set_grads([a, b], [torch.tensor([0.0, 2, 0, 0]), torch.tensor([8.0, 8, 8, 9])])
    optimizer.step()
    first, second = (optimizer.state[p]["grad_estimate"].tolist() for p in (a, b))
    assert second == [8, 8, 8, 9 if scope == "tensor" else 8]
    assert first == ([0, 2, 0, 0] if scope == "tensor" else [0, 0, 0, 0])


@every_backend
@every_compressor
def test_ef21_plus_is_never_further_off(compressor: Compressor, backend: str) -> None:
    """Its estimate is the better of the two that its state allows, in every step."""
    params = make_params(SHAPES, torch.float64)
    optimizer = EF21Plus(params, 0.1, compressor, init="zero", backend=backend)
    estimates = [torch.zeros_like(p) for p in params]
    taken = set()
    for step, row in enumerate(record_grads(params, 6)):
        advance(optimizer, params, [row])
        whole = [g - h for g, h in zip(row, estimates, strict=True)]
        one = [h + c for h, c in zip(estimates, compressor.compress(whole, step=step), strict=True)]
        two = compressor.compress(row, step=step)
        for i, p in enumerate(params):
            if p.numel():
                estimates[i] = optimizer.state[p]["grad_estimate"].clone()
        units = (
            [range(len(params))]
            if compressor.scale_scope == "global"
            else [[i] for i in range(len(params))]
        )
        for unit in units:
            errors = [sum(float((row[i] - x[i]).square().sum()) for i in unit) for x in (one, two)]
            better = two if errors[1] < errors[0] else one
            taken.add(better is two)
            for i in unit:
                torch.testing.assert_close(estimates[i], better[i], rtol=1e-12, atol=1e-12)
    assert taken == {True, False} or isinstance(compressor, Identity)


def quadratic(cls: Any, lr: float, steps: int, **kwargs: Any) -> list[float]:
    """The divergence example for top-1 without feedback: three clients' sum, on one worker."""
    rows = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([p], lr, TopK(k=1), **kwargs)
    norms = []
    for _ in range(steps):
        loss = ((rows @ p) ** 2).sum() / 3 + p.square().sum() / 4
        optimizer.zero_grad()
        loss.backward()
        assert p.grad is not None
        norms.append(float(p.grad.norm()))
        optimizer.step()
    return norms


@every_backend
def test_feedback_converges(backend: str) -> None:
    assert quadratic(EF21, 0.01, 3000, backend=backend)[-1] < 1e-9
    assert quadratic(EFSGD, 0.01, 3000, backend=backend)[-1] < 1e-9


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: EFSGD(p, 0.1, "top_k"), TypeError, "compressor must be one of"),
        (lambda p: EFSGD(p, -1.0, Identity()), ValueError, "lr must be at least 0"),
        (
            lambda p: EFSGD(p, 0.1, Identity(), max_norm=1.0, nonfinite="zero"),
            ValueError,
            "nonfinite='zero' does not go with clip='hard'",
        ),
        (lambda p: EFSGD(p, 0.1, Identity(), max_norm=-1.0), ValueError, "max_norm must be"),
        (lambda p: EFSGD(p, 0.1, Identity(), momentum=1.0), ValueError, "momentum must be in"),
        (lambda p: EF21(p, 0.1, Identity(), eta=0.0), ValueError, "eta must be greater than 0"),
        (lambda p: EF21(p, 0.1, Identity(), eta=1.5), ValueError, "eta must be in"),
        (lambda p: EF21(p, 0.1, Identity(), init="none"), ValueError, "init must be one of"),
        (lambda p: EF21(p, 0.1, Identity(), normalize=1), TypeError, "normalize must be True"),
        (lambda p: Clip21(p, 0.1, 0.0), ValueError, "tau must be greater than 0"),
        (lambda p: Clip21SGD2M(p, 0.1, 1.0, 1.5), ValueError, "beta must be in"),
        (lambda p: Clip21SGD2M(p, 0.1, 1.0, 0.5, 0.0), ValueError, "beta_hat must be greater"),
        (lambda p: Clip21SGD2M(p, noise_std=-1.0), ValueError, "noise_std must be at least 0"),
        (lambda p: Clip21(p, noise_std=math.nan), ValueError, "noise_std must be"),
        (lambda p: Clip21(p, seed=-1), ValueError, "seed must be"),
        (lambda p: Clip21SGD2M(p, seed=-1), ValueError, "seed must be"),
        (lambda p: NormalizedSGD(p, momentum=1.0), ValueError, "momentum must be less than 1"),
        (lambda p: EFSGD(p, 0.1, Compressor()), TypeError, "compressor must be one of"),
    ],
)
def test_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(make_params([(3,)]))


def test_block_that_divides_no_chunk() -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = EFSGD([p], 0.1, TopK(k=1, scope="block", block_size=1000))
    with pytest.raises(TypeError, match="block_size 1000 does not divide"):
        optimizer.step()
    assert p.tolist() == [1, 1, 1]
    assert len(optimizer.state) == 0


@every_backend
@every_compressor
def test_residual(compressor: Compressor, backend: str) -> None:
    """What the updates owe: the sum of lr * g, less how far the parameter has moved."""
    params = make_params(SHAPES, torch.float64)
    optimizer = EFSGD(params, 0.1, compressor, backend=backend)
    start = [p.detach().clone() for p in params]
    for p in params:
        assert torch.equal(optimizer.residual(p), torch.zeros_like(p))
    rows = record_grads(params, 3)
    advance(optimizer, params, rows)
    for i, p in enumerate(params):
        owed = 0.1 * torch.stack([row[i] for row in rows]).sum(dim=0) + p.detach() - start[i]
        size = float(sum(row[i].abs().sum() for row in rows)) + 1
        torch.testing.assert_close(optimizer.residual(p), owed, rtol=0, atol=1e-11 * size)
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        optimizer.residual(torch.zeros(3))
