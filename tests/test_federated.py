"""Federated methods against plain loops; sums that do not depend on who came first; resuming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pysmooth import federated as fed
from pysmooth.federated.clients import drawn, shuffled
from pysmooth.federated.draws import permutation
from pysmooth.federated.method import draw_cohort
from pysmooth.reference import random

D, N = 7, 12  # dimensions; samples of a client


def quartic(data: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The gradient of mean ||x - x_i||^4."""

    def grad(x: Tensor, batch: Tensor | None) -> Tensor:
        away = x - (data if batch is None else data[batch])
        return (4 * away * away.square().sum(1, keepdim=True)).mean(0)

    return grad


def make_clients(count: int = 4, dtype: torch.dtype = torch.float64) -> dict[int, fed.Client]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(count, N, D, generator=generator, dtype=dtype)
    data += torch.arange(count, dtype=dtype)[:, None, None]
    return {i: fed.FunctionClient(quartic(data[i]), N) for i in range(count)}


def rounds_of(method: fed.Method) -> None:
    fed.Server(method, torch.zeros(D, dtype=torch.float64)).round(make_clients(3))


def no_model_client(inputs: int, targets: int) -> fed.ModelClient:
    xs, ys = torch.ones(inputs, 1), torch.ones(targets, 1)
    return fed.ModelClient(torch.nn.Linear(1, 1), functional.mse_loss, xs, ys)


def model_client() -> fed.ModelClient:
    line = torch.nn.Linear(1, 1, dtype=torch.float64)
    inputs = torch.arange(6.0, dtype=torch.float64).view(-1, 1)
    return fed.ModelClient(line, functional.mse_loss, inputs, inputs**2)


def run(method: fed.Method, clients: dict[int, fed.Client], rounds: int, **kwargs: Any) -> Tensor:
    server = fed.Server(method, torch.full((D,), 3.0, dtype=torch.float64), **kwargs)
    for _ in range(rounds):
        server.round(clients)
    return server.x


def walk(
    client: fed.Client, x: Tensor, batches: list[Tensor | None], lr: float, c1: float = 0.0
) -> Tensor:
    y = x.clone()
    for batch in batches:
        g = client.grad(y, batch)
        y = y - g / (1 / lr + c1 * g.norm())
    return y


# ---- methods against their definitions ----------------------------------------------------------


@pytest.mark.parametrize("source", ["pseudo", "exact"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_clip_local_gdj(source: Any, batch_size: int | None) -> None:
    clients, lr, tau, c0, c1 = make_clients(), 1e-4, 3, 50.0, 0.7
    method = fed.ClipLocalGDJ(
        lr=lr, local_steps=tau, c0=c0, c1=c1, norm_source=source, batch_size=batch_size
    )
    x = torch.full((D,), 3.0, dtype=torch.float64)
    for p in range(4):
        ends = [
            walk(c, x, drawn(c, batch_size, tau, seed=0, first=p * tau, who=i), lr)
            for i, c in clients.items()
        ]
        g = torch.stack([(x - y) / (lr * tau) for y in ends]).mean(0)
        exact = torch.stack([c.grad(x, None) for c in clients.values()]).mean(0)
        x = x - g / (c0 + c1 * (exact if source == "exact" else g).norm())
    torch.testing.assert_close(run(method, clients, 4), x, rtol=1e-9, atol=0)


def test_one_local_step_on_all_samples_is_l0l1_gradient_descent() -> None:
    clients = make_clients()
    x = torch.full((D,), 3.0, dtype=torch.float64)
    for _ in range(5):
        g = torch.stack([c.grad(x, None) for c in clients.values()]).mean(0)
        x = x - g / (10 + 3 * g.norm())
    for source in ("pseudo", "exact"):
        method = fed.ClipLocalGDJ(lr=1e-9, c0=10.0, c1=3.0, norm_source=source)  # type: ignore[arg-type]
        torch.testing.assert_close(run(method, clients, 5), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shuffle", ["every", "once"])
def test_clerr_and_nastya(shuffle: Any) -> None:
    clients, lr = make_clients(), 1e-4
    for c1, method in [
        (0.7, fed.CLERR(lr=lr, c0=5e3, c1=0.7, batch_size=5, shuffle=shuffle)),
        (0.0, fed.nastya(lr, 1 / 5e3, batch_size=5, shuffle=shuffle)),
    ]:
        x = torch.full((D,), 3.0, dtype=torch.float64)
        for t in range(4):
            means = []
            for i, c in clients.items():
                epoch = t if shuffle == "every" else 0
                y, total = x.clone(), torch.zeros_like(x)
                for batch in shuffled(c, 5, seed=0, epoch=epoch, who=i):
                    assert batch is not None
                    g = c.grad(y, batch)
                    y, total = y - lr * g, total + g * len(batch) / N
                means.append(total)
            mean = torch.stack(means).mean(0)
            x = x - mean / (5e3 + c1 * mean.norm())
        torch.testing.assert_close(run(method, clients, 4), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("source", ["pseudo", "exact"])
def test_clipped_rr_cli(source: Any) -> None:
    clients, lr, eta, c0, c1 = make_clients(6), 1e-4, 1e-3, 50.0, 0.7
    method = fed.ClippedRRCLI(
        lr=lr, server_lr=eta, cohort=2, c0=c0, c1=c1, batch_size=5, norm_source=source
    )
    x = torch.full((D,), 3.0, dtype=torch.float64)
    for t in range(2):
        order = draw_cohort(list(clients), 6, seed=0, step=t)
        assert sorted(order) == list(clients)  # every client, once
        y, total = x.clone(), torch.zeros_like(x)
        for r in range(3):
            gs = []
            for i in order[2 * r : 2 * r + 2]:
                batches = shuffled(clients[i], 5, seed=0, epoch=3 * t + r, who=i)
                z, g = y.clone(), torch.zeros_like(y)
                for batch in batches:
                    assert batch is not None
                    s = clients[i].grad(z, batch)
                    z, g = z - lr * s, g + s * len(batch) / N
                gs.append(g)
            g_r = torch.stack(gs).mean(0)
            y, total = y - eta * g_r, total + g_r
        g = total / 3
        torch.testing.assert_close(g, (x - y) / (eta * 3))
        exact = torch.stack([c.grad(x, None) for c in clients.values()]).mean(0)
        x = x - g / (c0 + c1 * (exact if source == "exact" else g).norm())
    torch.testing.assert_close(run(method, clients, 6), x, rtol=1e-9, atol=0)


def test_one_cohort_of_all_is_clerr() -> None:
    clients = make_clients()
    mine = run(fed.ClippedRRCLI(lr=1e-4, cohort=4, c0=9.0, c1=1.0, batch_size=5), clients, 3)
    assert torch.equal(mine, run(fed.CLERR(lr=1e-4, c0=9.0, c1=1.0, batch_size=5), clients, 3))


def test_averaging() -> None:
    clients, lr, tau = make_clients(), 1e-4, 3
    clients[0].samples = 5  # by the first 5 of its samples
    x = torch.full((D,), 3.0, dtype=torch.float64)
    ends = {i: walk(c, x, [None] * tau, lr) for i, c in clients.items()}
    moved = {i: x - y for i, y in ends.items()}
    n = {i: c.samples for i, c in clients.items()}
    fedavg = sum(n[i] * ends[i] for i in n) / sum(n.values())
    torch.testing.assert_close(run(fed.FedAvg(lr=lr, local_steps=tau), clients, 1), fedavg)
    plain = torch.stack(list(ends.values())).mean(0)
    alike = fed.FedAvg(lr=lr, local_steps=tau, by_samples=False)
    torch.testing.assert_close(run(alike, clients, 1), plain)
    clip = 0.01
    clipped = [u / tau * min(1.0, clip / float((u / tau).norm())) for u in moved.values()]
    assert any(float((u / tau).norm()) > clip for u in moved.values())
    ce = fed.CEFedAvg(lr=lr, local_steps=tau, server_lr=2.0, clip=clip)
    torch.testing.assert_close(
        run(ce, clients, 1), x - 2 * torch.stack(clipped).mean(0), rtol=1e-12, atol=0
    )
    ends = {i: walk(c, x, [None] * tau, 1 / 20, 0.5) for i, c in clients.items()}
    celgc = fed.CELGC(local_steps=tau, c0=20.0, c1=0.5)
    torch.testing.assert_close(run(celgc, clients, 1), torch.stack(list(ends.values())).mean(0))


def test_cohorts_are_drawn_without_replacement_and_reach_everybody() -> None:
    method = fed.FedAvg(cohort=3)
    state = method.start(torch.zeros(1))
    seen = set()
    for state.rounds in range(30):
        cohort = method.participants(state, range(8))
        assert len(set(cohort)) == 3
        seen |= set(cohort)
    assert seen == set(range(8))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "samples", "reason"),
    [
        ((torch.zeros(4),), 1, "shape"),
        ((torch.zeros(3, 1),), 1, "shape"),
        ((torch.zeros(3), torch.zeros(3)), 1, "shape"),
        (([0.0, 0.0, 0.0],), 1, "shape"),
        ((torch.zeros(3, dtype=torch.float64),), 1, "dtype"),
        ((torch.tensor([0.0, float("nan"), 0.0]),), 1, "nonfinite"),
        ((torch.tensor([0.0, float("inf"), 0.0]),), 1, "nonfinite"),
        ((torch.zeros(3),), 0, "samples"),
    ],
)
def test_bad_uploads_are_refused(vectors: Any, samples: Any, reason: str) -> None:
    uploads = fed.Uploads(3, torch.float32)
    with pytest.raises(fed.UploadError, match="client 5") as error:
        uploads.add(5, vectors, samples)
    assert error.value.reason == reason
    assert len(uploads) == 0
    uploads.add(5, (torch.ones(3),))
    with pytest.raises(fed.UploadError, match="already"):
        uploads.add(5, (torch.ones(3),))
    with pytest.raises(ValueError, match="no client"):
        uploads.combine({})


# ---- resuming -----------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], fed.Method]] = {
    "gdj": lambda: fed.ClipLocalGDJ(lr=1e-4, local_steps=2, batch_size=5, c0=50.0, c1=1.0),
    "clerr": lambda: fed.CLERR(lr=1e-4, batch_size=5, c0=50.0, c1=1.0, norm_source="exact"),
    "rr-cli": lambda: fed.ClippedRRCLI(lr=1e-4, cohort=2, batch_size=5, c0=50.0, c1=1.0),
    "rr-cli-exact": lambda: fed.ClippedRRCLI(
        lr=1e-4, cohort=2, batch_size=5, c0=50.0, c1=1.0, norm_source="exact"
    ),
    "fedavg": lambda: fed.FedAvg(lr=1e-4, cohort=2, local_steps=2, batch_size=5),
    "merit": lambda: fed.MeritFed(lr=1e-4, clients=4, target=lambda y, k: y, batch_size=5),
    "meritopt": lambda: fed.MeritOpt(lr=1e-2, clients=4, target=lambda y, k: y, batch_size=5),
    "merit-zo": lambda: fed.MeritFed(
        lr=1e-4, clients=4, value=lambda y, k: float(y @ y), inner_lr=0.01, batch_size=5
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [2, 3])
def test_resuming_gives_the_same_bits(name: str, at: int, tmp_path: Any) -> None:
    clients, method = make_clients(), METHODS[name]()
    whole = fed.Server(method, torch.full((D,), 3.0, dtype=torch.float64))
    for i in range(7):
        if i == at:
            torch.save(whole.state_dict(), tmp_path / "server")
        whole.round(clients)
    resumed = fed.Server(METHODS[name](), torch.zeros(D, dtype=torch.float64))
    resumed.load_state_dict(torch.load(tmp_path / "server", weights_only=True))
    for _ in range(7 - at):
        resumed.round(clients)
    mine, theirs = resumed.state.state_dict(), whole.state.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(mine[key], value) if isinstance(value, Tensor) else mine[key] == value
        assert same, key
    assert resumed.taken == whole.taken


def test_states_that_do_not_fit_are_refused() -> None:
    server = fed.Server(METHODS["rr-cli"](), torch.ones(D))
    before = server.state_dict()
    for other in (
        fed.Server(METHODS["fedavg"](), torch.zeros(D)),
        fed.Server(METHODS["rr-cli"](), torch.zeros(D + 1)),
        fed.Server(METHODS["rr-cli"](), torch.zeros(D, dtype=torch.float64)),
        fed.Server(METHODS["rr-cli-exact"](), torch.zeros(D)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            server.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        server.load_state_dict({})
    assert torch.equal(server.x, before["state"]["x"])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fed.CLERR(lr=0.0), "lr"),
        (lambda: fed.CLERR(c0=-1.0), "c0"),
        (lambda: fed.CLERR(c0=0.0), "c0 or c1"),
        (lambda: fed.CLERR(norm_source="true"), "norm_source"),  # type: ignore[arg-type]
        (lambda: fed.CLERR(shuffle="never"), "shuffle"),  # type: ignore[arg-type]
        (lambda: fed.CLERR(batch_size=0), "batch_size"),
        (lambda: fed.ClippedRRCLI(), "cohort"),
        (lambda: fed.ClipLocalGDJ(local_steps=0), "local_steps"),
        (lambda: fed.FedAvg(server_lr=float("inf")), "server_lr"),
        (lambda: fed.CEFedAvg(clip=float("nan")), "clip"),
        (lambda: fed.CELGC(c0=0.0), "c0 or c1"),
        (lambda: fed.Clip21SGD2M(beta=0.0), "beta"),
        (lambda: fed.Clip21SGD2M(noise_std=-1.0), "noise_std"),
        (lambda: fed.MeritFed(clients=3), "target"),
        (lambda: fed.MeritOpt(target=lambda y, k: y, betas=(1.0, 0.9)), "betas"),
        (lambda: fed.Server(fed.FedAvg(), torch.zeros(2, 2)), "x must be a vector"),
        (lambda: fed.Server(fed.FedAvg(), torch.zeros(2, dtype=torch.bfloat16)), "dtype"),
        (lambda: fed.Server(fed.FedAvg(), torch.zeros(2), min_clients=0), "min_clients"),
        (lambda: fed.Server(fed.FedAvg(), torch.zeros(2), timeout=0.0), "timeout"),
        (lambda: fed.FedAvg(cohort=3).participants(fed.State(torch.zeros(1)), [1, 2]), "cohort"),
        (lambda: fed.nastya(1e-3, 0.0), "server_lr"),
        (lambda: rounds_of(fed.ClippedRRCLI(cohort=2)), "cohort must divide 3"),
        (
            lambda: rounds_of(fed.MeritFed(clients=2, target=lambda y, k: y)),
            "client 2: there are 2",
        ),
        (lambda: no_model_client(2, 3), "2 inputs, 3 targets"),
        (lambda: no_model_client(0, 0), "0 inputs, 0 targets"),
        (lambda: model_client().load(torch.ones(3)), "x must be a vector of 2 numbers"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()


def test_a_models_gradient_of_a_batch_is_that_of_its_samples() -> None:
    client = model_client()
    x, batch = torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([4, 1])
    u = client.inputs[batch]
    away = u * 0.5 - 2.0 - u**2
    expected = torch.stack([(2 * away * u).mean(), (2 * away).mean()])
    torch.testing.assert_close(client.grad(x, batch), expected)
    assert torch.equal(client.vector(), x)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 5), (16, 100), (100, 100)])
def test_draws_are_those_of_the_reference(count: int, size: int) -> None:
    for key in ({"seed": 0, "step": 3, "tensor_id": 2**31 - 1}, {"seed": 2**63 + 7, "step": 0}):
        key = {"tensor_id": 5, **key}
        assert torch.equal(permutation(count, size, **key), random.permutation(count, size, **key))
