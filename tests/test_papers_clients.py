"""What experiments with clients share: clipped messages, a small net, attacks, an exact delta."""

from __future__ import annotations

import math

import pytest
import torch
from pysmooth.bench.papers import clipping, means, small_net
from pysmooth.bench.papers.outcome import Config
from pysmooth.bench.papers.runs import F64, Runs
from torch.nn import functional as F  # noqa: N812

from pysmooth.federated import attacks


@pytest.mark.parametrize("name", clipping.METHODS)
def test_methods_by_hand(name):
    generator = torch.Generator().manual_seed(0)
    runs, lrs, n, tau, beta_hat = Runs(torch.zeros(3, 5, dtype=F64)), [0.1, 0.2, 3.0], 4, 1.5, 0.5
    method = clipping.Clipping(name, runs, lrs, n, tau, beta=0.3, beta_hat=beta_hat)
    beta, beta_hat = (0.3, beta_hat) if name == "Clip21-SGD2M" else (1.0, 1.0)
    x, v, h = torch.zeros(3, 5, dtype=F64), *torch.zeros(2, n, 3, 5, dtype=F64)
    for _ in range(8):
        grads = torch.randn(n, 3, 5, generator=generator, dtype=F64)
        method.grad.copy_(grads)
        method.step()
        v = (1 - beta) * v + beta * grads
        if name == "Clip-SGD":
            h = torch.zeros_like(h)
        away = v - h
        u = away * (tau / away.norm(dim=2, keepdim=True)).clamp(max=1.0)
        h = h + beta_hat * u
        x = x - torch.tensor(lrs, dtype=F64).view(3, 1) * h.mean(0)
        torch.testing.assert_close(runs.x, x, rtol=1e-12, atol=1e-12)
    assert x.norm() > 1


@pytest.mark.parametrize(("name", "gathers"), [("Clip-SGD", False), ("Clip21-SGD", True)])
def test_noise_is_gathered_by_estimates_alone(name, gathers):
    """Without gradients x is a random walk, or the sum of one."""
    runs, n, k, std = Runs(torch.zeros(2, 500, dtype=F64)), 4, 20, 3.0
    method = clipping.Clipping(name, runs, [1.0, 1.0], n, 1.0, std)
    for _ in range(k):
        method.step()
    terms = sum(i**2 for i in range(1, k + 1)) if gathers else k
    expected = std * math.sqrt(terms / n)
    assert float(runs.x.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)
    assert not torch.equal(runs.x[0], runs.x[1])


def test_the_best_step_size_is_no_diverging_one():
    tails = torch.tensor([[3.0, 4.0, 5.0], [math.nan, 1.0, math.nan], [2.0, 2.5, 9.0]])
    assert clipping.best(tails) == 2


def test_exact_delta():
    assert clipping.exact_delta(1.0, 2.0, 1.0, 1) == pytest.approx(0.12694, abs=1e-5)  # mu = 1
    assert clipping.exact_delta(1.0, 20.0, 1.0, 100) == pytest.approx(0.12694, abs=1e-5)
    assert clipping.exact_delta(2.0, 2.0, 1.0, 1) < 0.03


def test_clients_have_two_digits_each_and_gradients_are_those_of_each_net():
    clients = small_net.Clients(10, 13)
    for i, labels in enumerate(clients.labels):
        assert set(labels.tolist()) == {2 * (i % 5), 2 * (i % 5) + 1}
    clients.batch = clients.labels.shape[1]  # all of them: the order does not matter
    nets = torch.stack([small_net.started(seed) for seed in range(4)])
    found = clients.gradients(nets, torch.Generator().manual_seed(0), 2)
    assert found.shape == (10, 4, small_net.SIZE)
    for i, j in ((0, 0), (7, 3)):
        net = nets[j].clone().requires_grad_()
        out = small_net.logits(net, clients.images[i])
        (expected,) = torch.autograd.grad(F.cross_entropy(out, clients.labels[i]), net)
        torch.testing.assert_close(found[i, j], expected, rtol=1e-4, atol=1e-6)


def test_batches_are_shared_by_step_sizes_and_not_by_seeds():
    clients = small_net.Clients(5, 3)
    nets = small_net.started(0).repeat(4, 1)
    g = clients.gradients(nets, torch.Generator().manual_seed(0), 2)
    torch.testing.assert_close(g[:, 0], g[:, 2])
    torch.testing.assert_close(g[:, 1], g[:, 3])
    assert not torch.allclose(g[:, 0], g[:, 1])


def test_the_far_clients_attack():
    groups, lr = means.Groups(1, 2, 3), 0.5
    problem = means.Problem(0.1, groups, torch.Generator().manual_seed(0))
    x = problem.start
    curve, masses = means.walk(
        Config(),
        "flip",
        [means.FedAvg(lr=lr, by_samples=False)],
        [problem],
        1,
        attack=lambda own, everybody: attacks.bit_flip(own),
    )
    grads = [client.grad(x, None) for client in problem.clients.values()]
    x = x - lr * (sum(grads[:3]) - sum(grads[3:])) / 6
    assert float(curve.values[0, -1]) == pytest.approx(float(x.square().sum()), rel=1e-12)
    torch.testing.assert_close(masses[0, 0], torch.tensor([1, 2, 3], dtype=F64) / 6)
