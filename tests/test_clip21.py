"""Clip21 and normalised momentum: what must hold exactly, or to rounding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from battery import BACKENDS, advance, assert_same_bits, make_params, record_grads
from torch import Tensor
from torch.nn import Parameter

from pysmooth import Clip21, Clip21SGD2M, NormalizedSGD

every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = ((130, 70), (33,), (), (0, 2), (257,), (20000,))


# ---- Clip21 -------------------------------------------------------------------------------------


@every_backend
def test_clip21_without_a_clip_is_sgd(backend: str) -> None:
    params, plain = make_params(SHAPES), make_params(SHAPES)
    rows = record_grads(params, 4)
    advance(Clip21SGD2M(params, 0.1, math.inf, 1.0, 1.0, backend=backend), params, rows)
    advance(torch.optim.SGD(plain, 0.1), plain, rows)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


@every_backend
def test_clip21_stops_clipping(backend: str) -> None:
    """Each step brings the estimate closer by tau; then it is the gradient."""
    p = Parameter(torch.zeros(2, dtype=torch.float64))
    grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer = Clip21([p], 0.1, 2.0, backend=backend)
    for expected in (2.0, 4.0, 5.0, 5.0):
        p.grad = grad.clone()
        optimizer.step()
        estimate = optimizer.state[p]["grad_estimate"]
        assert float(estimate.norm()) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(optimizer.state[p]["grad_estimate"], grad)


@every_backend
@pytest.mark.parametrize(
    ("make", "weights", "beta_hat"),
    [(Clip21SGD2M, {"beta": 0.3, "beta_hat": 0.2}, 0.2), (Clip21, {}, 1.0)],
    ids=["clip21_sgd2m", "clip21"],
)
def test_clip21_noise_stays_with_the_server(
    make: Any, weights: dict[str, float], beta_hat: float, backend: str
) -> None:
    """server - worker is beta_hat times the sum of the noise; without noise they are equal."""
    params, quiet = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer = make(params, 0.0, 0.5, noise_std=2.0, seed=7, backend=backend, **weights)
    plain = make(quiet, 0.0, 0.5, backend=backend, **weights)
    rows = record_grads(params, 30)
    advance(optimizer, params, rows)
    advance(plain, quiet, rows)
    noise = []
    for p, q in zip(params, quiet, strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(state["grad_estimate"], plain.state[q]["grad_estimate"])
        noise.append((state["server_estimate"] - state["grad_estimate"]).flatten())
    drawn = torch.cat(noise) / (beta_hat * 2.0 * math.sqrt(30))
    assert abs(float(drawn.std()) - 1) < 5 / math.sqrt(2 * len(drawn))
    assert abs(float(drawn.mean())) < 5 / math.sqrt(len(drawn))


@every_backend
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_clip21_is_its_relative_without_momentum(noise_std: float, backend: str) -> None:
    params, others = make_params(), make_params()
    kwargs: dict[str, Any] = {"weight_decay": 0.1, "noise_std": noise_std, "backend": backend}
    optimizer = Clip21(params, 0.1, 2.0, **kwargs)
    relative = Clip21SGD2M(others, 0.1, 2.0, 1.0, 1.0, **kwargs)
    rows = record_grads(params, 5)
    advance(optimizer, params, rows)
    advance(relative, others, rows)
    assert_same_bits(params, others)
    for p, q in zip(params, others, strict=True):
        for key in optimizer.recipes()[0].states:
            assert_same_bits([optimizer.state[p][key]], [relative.state[q][key]])


# ---- normalised momentum ------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_normalized_sgd(scope: Any, backend: str) -> None:
    params = make_params([(30,), (4, 5), (6,)], torch.float64)
    plain = [p.detach().clone() for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = NormalizedSGD(groups, 0.1, momentum=0.7, scope=scope, backend=backend)
    units = {"global": [[0, 1, 2]], "group": [[0, 1], [2]], "tensor": [[0], [1], [2]]}[scope]
    momentum: list[Tensor] = []
    for row in record_grads(params, 4):
        advance(optimizer, params, [row])
        momentum = [0.7 * m + 0.3 * g for m, g in zip(momentum or row, row, strict=True)]
        for unit in units:
            norm = torch.stack([momentum[i].norm() for i in unit]).norm()
            for i in unit:
                plain[i] -= 0.1 * momentum[i] / norm
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-13)
