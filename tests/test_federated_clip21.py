"""Clip21-SGD2M between clients and a server; the privacy budget of its messages."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pysmooth import federated as fed
from pysmooth.federated.clip21 import Worker

D = 33


def pulls(n: int) -> list[Tensor]:
    return list(
        torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    )


def start(method: Any, n: int = 4) -> tuple[fed.Server, dict[int, fed.Client], list[Tensor]]:
    x = torch.zeros(D, dtype=torch.float64)
    targets = pulls(n)
    clients: dict[int, fed.Client] = {
        i: method.worker(fed.FunctionClient(lambda x, batch, t=t: x - t), i, x)  # type: ignore[misc]
        for i, t in enumerate(targets)
    }
    return fed.Server(method, x), clients, targets


def estimate(client: fed.Client) -> Tensor:
    assert isinstance(client, Worker)
    found = client.optimizer.state[client._param]["grad_estimate"]
    assert isinstance(found, Tensor)
    return found


def test_definition() -> None:
    beta, beta_hat, tau, lr, n = 0.3, 0.5, 1.5, 0.1, 4
    method = fed.Clip21SGD2M(lr=lr, tau=tau, beta=beta, beta_hat=beta_hat)
    server, clients, targets = start(method)
    x, h = torch.zeros(2, D, dtype=torch.float64)
    v, own = torch.zeros(2, n, D, dtype=torch.float64)
    for _ in range(30):
        for i in range(n):
            v[i] = (1 - beta) * v[i] + beta * (x - targets[i])
            u = (v[i] - own[i]) * min(1.0, tau / float((v[i] - own[i]).norm()))
            own[i] += beta_hat * u
            h = h + beta_hat / n * u
        x = x - lr * h
        server.round(clients)
        torch.testing.assert_close(server.x, x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimate(clients[2]), own[2], rtol=1e-10, atol=1e-12)
    assert server.x.norm() > 1


def test_special_cases() -> None:
    """tau = inf is SGD with momentum 1 - beta; Clip-SGD is biased where Clip21 is not."""
    server, clients, targets = start(fed.Clip21SGD2M(lr=0.1, tau=1e300, beta=1.0))
    x = torch.zeros(D, dtype=torch.float64)
    for _ in range(5):
        server.round(clients)
        x = x - 0.1 * (x - torch.stack(targets).mean(0))
    torch.testing.assert_close(server.x, x)
    best = torch.tensor([10.0, -1.0, -1.0], dtype=torch.float64).mean()
    ends = {}
    for make in (fed.ClipSGD, fed.Clip21SGD2M):
        method = make(lr=0.02, tau=1.0)
        x = torch.zeros(1, dtype=torch.float64)
        three = {
            i: method.worker(fed.FunctionClient(lambda x, batch, c=c: x - c), i, x)  # type: ignore[misc]
            for i, c in enumerate((10.0, -1.0, -1.0))
        }
        one = fed.Server(method, x)
        for _ in range(3000):
            one.round(three)
        ends[make] = float(one.x[0])
    assert ends[fed.ClipSGD] == pytest.approx(-0.5, abs=1e-6)  # far from 8/3
    assert ends[fed.Clip21SGD2M] == pytest.approx(float(best), abs=1e-6)


def test_noise() -> None:
    """h - mean(h_i) is beta_hat times the sum of the mean noise: of the stated variance."""
    beta_hat, std, rounds, n = 0.25, 2.0, 40, 4
    method = fed.Clip21SGD2M(lr=0.01, tau=1.0, beta_hat=beta_hat, noise_std=std)
    server, clients, _ = start(method, n)
    for _ in range(rounds):
        server.round(clients)
    assert isinstance(server.state, fed.clip21.EstimateState)
    noise = server.state.estimate - torch.stack([estimate(c) for c in clients.values()]).mean(0)
    expected = beta_hat * std * math.sqrt(rounds / n)
    assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=0.4)  # 33 draws
    # Clients draw apart: without that, n clients would average nothing out.
    quiet = fed.Clip21SGD2M(lr=0.01, tau=1.0, noise_std=std)
    _, (one, other, *_), _ = start(quiet)[0], list(start(quiet)[1].values()), None
    assert isinstance(one, Worker)
    assert isinstance(other, Worker)
    zeros = torch.zeros(D, dtype=torch.float64)
    a, b = (w.message(zeros.clone(), fed.Task(0, 0)) for w in (one, other))
    assert not torch.equal(a, b)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.6
    assert estimate(one).count_nonzero() == 0  # its own copy stays free of noise


def test_an_answer_that_was_not_taken_leaves_the_estimate() -> None:
    """Else the server's estimate would no more be the mean of the clients'."""
    method = fed.Clip21SGD2M(lr=0.1, tau=0.5, beta=0.5, beta_hat=0.5)
    server, clients, _ = start(method)
    for i in range(12):
        if i % 3 != 1:
            server.round(clients)
            continue
        # Client 2 computes its answer, which then gets lost.
        uploads = server.uploads()
        for number, client in clients.items():
            task = fed.Task(number, server.state.rounds, server.taken.get(number, -1))
            answer = method.reply(task, method.sent(server.state), client)
            if number != 2:
                server.take(uploads, number, answer)
        server.finish(uploads, 4)
    assert isinstance(server.state, fed.clip21.EstimateState)
    mean = torch.stack([estimate(c) for c in clients.values()]).mean(0)
    torch.testing.assert_close(server.state.estimate, mean, rtol=1e-12, atol=1e-12)
    assert mean.norm() > 1


@pytest.mark.parametrize("make", [fed.ClipSGD, fed.Clip21SGD2M])
@pytest.mark.parametrize("std", [0.0, 0.5])
def test_resuming(make: Any, std: float) -> None:
    method = make(lr=0.1, tau=0.5, noise_std=std, cohort=3)
    whole, clients, _ = start(method)
    for _ in range(3):
        whole.round(clients)
    saved = whole.state_dict(), {i: c.state_dict() for i, c in clients.items()}  # type: ignore[attr-defined]
    resumed, others, _ = start(method)
    resumed.load_state_dict(saved[0])
    for i, c in others.items():
        c.load_state_dict(saved[1][i])  # type: ignore[attr-defined]
    for _ in range(4):
        whole.round(clients)
        resumed.round(others)
    assert torch.equal(whole.x, resumed.x)
    assert all(torch.equal(estimate(clients[i]), estimate(others[i])) for i in clients)


def test_clients_must_be_workers() -> None:
    server = fed.Server(fed.ClipSGD(), torch.zeros(2))
    with (
        pytest.warns(RuntimeWarning, match=r"method\.worker"),
        pytest.raises(fed.NotEnoughClientsError),
    ):
        server.round({0: fed.FunctionClient(lambda x, batch: x)})


# ---- privacy ------------------------------------------------------------------------------------


def exact_delta(epsilon: float, mu: float) -> float:
    """Of the Gaussian mechanism (Balle and Wang, 2018); `mu` is sensitivity over deviation."""

    def phi(t: float) -> float:
        return 0.5 * math.erfc(-t / math.sqrt(2))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("budget", "rounds", "tau"), [(0.5, 100, 1.0), (3.0, 1000, 0.1), (15.6, 20, 4.0)]
)
def test_budget(budget: float, rounds: int, tau: float) -> None:
    """T messages with sensitivity 2 tau are one Gaussian mechanism of mu = 2 tau sqrt(T) / std."""
    delta = 1e-4
    std = fed.noise_for_budget(budget, delta, tau, rounds)
    spent = fed.privacy_spent(std, tau, rounds, delta)
    assert 0.999 * budget <= spent <= budget
    assert exact_delta(spent, 2 * tau * math.sqrt(rounds) / std) <= delta  # what is said holds
    assert exact_delta(0.75 * spent, 2 * tau * math.sqrt(rounds) / std) > delta  # and is no guess
    assert fed.privacy_spent(std, 2 * tau, rounds, delta) > spent
    assert fed.privacy_spent(std, tau, 2 * rounds, delta) > spent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # UserWarnings are errors
def test_the_search_does_not_warn_of_noise_that_it_only_tries() -> None:
    std = fed.noise_for_budget(27.0, 1e-3, 1.0, 1000)
    assert 0.999 * 27 <= fed.privacy_spent(std, 1.0, 1000, 1e-3) <= 27


def test_without_opacus_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match=r"opacus, .* pip install 'pysmooth\[dp\]'"):
        fed.privacy_spent(1.0, 1.0, 10, 1e-5)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"noise_std": 0.0}, "noise_std"),
        ({"tau": 0.0}, "tau"),
        ({"rounds": 0}, "rounds"),
        ({"delta": 1.0}, "delta"),
    ],
)
def test_bad_arguments(kwargs: Any, name: str) -> None:
    good = {"noise_std": 1.0, "tau": 1.0, "rounds": 3, "delta": 0.1}
    with pytest.raises(ValueError, match=name):
        fed.privacy_spent(**{**good, **kwargs})
    with pytest.raises(ValueError, match="epsilon"):
        fed.noise_for_budget(0.0, 0.1, 1.0, 3)
