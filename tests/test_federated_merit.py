"""MeritFed and MeritOpt: gradients of the weights, what is learned, attacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pysmooth import federated as fed
from pysmooth.federated.merit import MeritOptState, MeritState

D = 6


def gradients(n: int = 5) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def uploads_of(g: Tensor) -> fed.Uploads:
    uploads = fed.Uploads(D, g.dtype)
    for i, row in enumerate(g):
        uploads.add(i, (row,))
    return uploads


def loss(y: Tensor) -> Tensor:
    return (y - 1).pow(4).sum() + torch.sin(y).sum()


def target(y: Tensor, k: int) -> Tensor:
    y = y.clone().requires_grad_()
    return torch.autograd.grad(loss(y), y)[0]


@pytest.mark.parametrize("make", [fed.MeritFed, fed.MeritOpt])
def test_gradient_of_the_weights_is_that_of_autograd(make: Any) -> None:
    method = make(lr=0.3, clients=5, target=target)
    g, x = gradients(), torch.linspace(-1, 1, D, dtype=torch.float64)
    state = method.start(x)
    for rounds in range(3):  # Adam's averages are in motion
        state.rounds = rounds
        w = torch.softmax(torch.arange(5.0, dtype=torch.float64), 0).requires_grad_()
        total = (w.unsqueeze(1) * g).sum(0)
        if make is fed.MeritOpt:
            assert isinstance(state, MeritOptState)
            b1, b2 = method.betas
            m = b1 * state.exp_avg + (1 - b1) * total
            v = b2 * state.exp_avg_sq + (1 - b2) * total.square()
            t = rounds + 1
            y = state.x - 0.3 * m / (1 - b1**t) / (v / (1 - b2**t) + method.eps).sqrt()
        else:
            y = state.x - 0.3 * total
        (expected,) = torch.autograd.grad(loss(y), w)
        found = method._weights_gradient(state, uploads_of(g), w.detach(), 0)
        torch.testing.assert_close(found, expected)
        method.update(state, uploads_of(gradients() * (rounds + 1)))


def test_a_round_is_its_definition() -> None:
    method = fed.MeritFed(lr=0.1, inner_steps=3, inner_lr=2.0, clients=5, target=target)
    g, x = gradients(), torch.zeros(D, dtype=torch.float64)
    state = method.start(x)
    w = torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(2):
        for k in range(3):
            q = -0.1 * g @ target(x - 0.1 * (w @ g), k)
            w = w * torch.exp(-2.0 * q)
            w = w / w.sum()
        x = x - 0.1 * (w @ g)
        method.update(state, uploads_of(g))
        torch.testing.assert_close(state.w, w)  # kept from round to round
        torch.testing.assert_close(state.x, x)
    averaging = fed.MeritFed(
        lr=0.1, inner_steps=3, inner_lr=2.0, clients=5, target=target, averaging=True
    )
    state = averaging.start(torch.zeros(D, dtype=torch.float64))
    averaging.update(state, uploads_of(g))
    w, seen = torch.full((5,), 0.2, dtype=torch.float64), []
    for k in range(3):
        q = -0.1 * g @ target(-0.1 * (w @ g), k)
        w = w * torch.exp(-2.0 * q)
        w = w / w.sum()
        seen.append(w)
    torch.testing.assert_close(state.w, torch.stack(seen).mean(0))


def test_meritopt_with_equal_gradients_is_adam() -> None:
    """Whatever the weights are, their sum is the one gradient; eps apart torch's own Adam."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, D, dtype=torch.float64))
    method = fed.MeritOpt(lr=0.05, clients=3, target=target, eps=1e-30)
    state = method.start(p.detach())
    adam = torch.optim.Adam([p], lr=0.05, eps=1e-15)
    for _ in range(5):
        g = target(state.x, 0)
        p.grad = g.clone()
        adam.step()
        method.update(state, uploads_of(torch.stack([g, g, g])))
        torch.testing.assert_close(state.x, p.detach())


def test_the_estimate_from_two_values_is_right_on_average() -> None:
    """Over directions, of what lies within the simplex's span: E n e e' = 1."""
    method = fed.MeritFed(lr=0.3, clients=5, value=lambda y, k: float(loss(y)))
    first = fed.MeritFed(lr=0.3, clients=5, target=target)
    g, x = gradients(), torch.linspace(-1, 1, D, dtype=torch.float64)
    state = method.start(x)
    uploads, w = uploads_of(g), torch.full((5,), 0.2, dtype=torch.float64)
    total = torch.zeros(5, dtype=torch.float64)
    for state.rounds in range(3000):
        total += method._weights_gradient(state, uploads, w, 0)
    exact = first._weights_gradient(state, uploads, w, 0)
    assert float((total / 3000 - exact).norm() / exact.norm()) < 0.1


def test_absent_clients_keep_their_weights() -> None:
    method = fed.MeritFed(lr=0.1, clients=5, target=target)
    state = method.start(torch.zeros(D, dtype=torch.float64))
    method.update(state, uploads_of(gradients()))
    before = state.w.clone()
    some = fed.Uploads(D, torch.float64)
    for i in (4, 1, 2):
        some.add(i, (gradients()[i],))
    method.update(state, some)
    assert torch.equal(state.w[[0, 3]], before[[0, 3]])
    assert not torch.equal(state.w, before)
    assert float(state.w.sum()) == pytest.approx(1.0)


# ---- what is learned ----------------------------------------------------------------------------


def mean_estimation(
    method: Any, means: Tensor, attack: str | None = None, rounds: int = 400
) -> Any:
    """Gradients of ||x - mean_i||^2 / d with noise; the last clients are Byzantine, if asked."""
    n, d = means.shape
    generator = torch.Generator().manual_seed(0)
    state = method.start(torch.ones(d, dtype=torch.float64) / d**0.5)
    for _ in range(rounds):
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * 0.1
        g = list(2 / d * (state.x - means + noise))
        honest = g[: n - 4]
        for i in range(n - 4, n):
            if attack == "flip":
                g[i] = fed.attacks.bit_flip(g[i]) * 3
            elif attack == "ipm":
                g[i] = fed.attacks.inner_product_manipulation(honest, 3.0)
            elif attack == "alie":
                g[i] = fed.attacks.a_little_is_enough(honest, 10.0)
        uploads = fed.Uploads(d, torch.float64)
        for i, row in enumerate(g):
            uploads.add(i, (row,))
        method.update(state, uploads)
    return state


@pytest.mark.parametrize("attack", [None, "flip", "ipm", "alie"])
def test_clients_that_harm_the_target_lose_their_weight(attack: str | None) -> None:
    d = 10
    means = torch.zeros(12, d, dtype=torch.float64)
    if attack is None:
        means[8:, 1::2] = 1.0  # honest, of another distribution

    def value(y: Tensor, k: int) -> Tensor:
        return 2 / d * y

    merit = fed.MeritFed(lr=0.5, clients=12, inner_lr=20.0, target=value)
    state = mean_estimation(merit, means, attack)
    assert isinstance(state, MeritState)
    assert float(state.w[8:].sum()) < 0.05
    plain = mean_estimation(fed.FedAvg(), means, attack)  # the mean of all
    assert float(state.x.norm()) < 0.2 * float(plain.x.norm())


def test_attacks() -> None:
    g = list(gradients())
    assert torch.equal(fed.attacks.bit_flip(g[0]), -g[0])
    ipm = fed.attacks.inner_product_manipulation(g, 0.1)
    assert float(ipm @ torch.stack(g).mean(0)) < 0
    torch.testing.assert_close(ipm, -0.1 * gradients().mean(0))
    alie = fed.attacks.a_little_is_enough(g, 2.0)
    torch.testing.assert_close(alie, gradients().mean(0) - 2 * gradients().std(0, correction=0))
