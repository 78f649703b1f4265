"""Strategies and clients of Flower: `make test-federated`, in an environment that has Flower.

Most tests hand messages over in this process; one goes through Flower's simulation engine.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pysmooth import federated as fed
from pysmooth.federated import flower

flwr = pytest.importorskip("flwr.app", reason="Flower has an environment of its own")
from flwr.serverapp import Grid, ServerApp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

D, N = 5, 4


def make_client(number: int) -> fed.FunctionClient:
    data = torch.randn(12, D, generator=torch.Generator().manual_seed(number)) + number

    def grad(x: Tensor, batch: Tensor | None) -> Tensor:
        away = x - (data if batch is None else data[batch])
        return (4 * away * away.square().sum(1, keepdim=True)).mean(0)

    return fed.FunctionClient(grad, 12)


class Nodes(Grid):  # type: ignore[misc]
    """N nodes in this process, that answer in another order each time; some of them badly."""

    def __init__(self, app: Any, fault: str | None = None) -> None:
        self.app, self.fault, self.calls = app, fault, 0
        self.contexts = {
            1000 - 7 * i: flwr.Context(1, 1000 - 7 * i, {"partition-id": i}, flwr.RecordDict(), {})
            for i in range(N)
        }

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        out = []
        for message in messages:
            node = message.metadata.dst_node_id
            context = self.contexts[node]
            train = message.metadata.message_type == "train"
            bad = self.fault if train and context.node_config["partition-id"] == 2 else None
            if bad == "late":
                continue
            if bad == "error":
                reply = flwr.Message(flwr.Error(0, "out of memory"), reply_to=message)
            else:
                reply = self.app(message, context)
                if bad is not None:
                    bads = {"shape": torch.zeros(D + 1), "nan": torch.full((D,), float("nan"))}
                    reply.content["arrays"] = flower.pack((bads[bad],))
            reply.metadata.__dict__["_src_node_id"] = node
            out.append(reply)
        self.calls += 1
        return out[:: -1 if self.calls % 2 else 1]

    set_run = run = create_message = push_messages = pull_messages = None


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's engine would tell a ServerApp's process: messages carry it."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


METHODS: dict[str, fed.Method] = {
    "gdj": fed.ClipLocalGDJ(lr=1e-4, local_steps=2, batch_size=5, c0=50.0, c1=1.0),
    "clerr": fed.CLERR(lr=1e-4, batch_size=5, c0=50.0, c1=1.0, norm_source="exact"),
    "rr-cli": fed.ClippedRRCLI(
        lr=1e-4, cohort=2, batch_size=5, c0=50.0, c1=1.0, norm_source="exact"
    ),
    "fedavg": fed.FedAvg(lr=1e-4, cohort=3, local_steps=2, batch_size=5),
    "merit": fed.MeritFed(lr=1e-4, clients=N, target=lambda y, k: y, batch_size=5),
    "clip-sgd": fed.ClipSGD(lr=0.1, tau=1.0, noise_std=0.1, batch_size=5),
    "clip21": fed.Clip21SGD2M(lr=0.1, tau=1.0, beta_hat=0.5, noise_std=0.1, batch_size=5),
}


def start(server: fed.Server, grid: Any, rounds: int = 5) -> Any:
    return flower.strategy(server).start(
        grid=grid, initial_arrays=flower.pack((server.x,)), num_rounds=rounds
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("in_process")
def test_same_bits_as_without_flower(name: str) -> None:
    method = METHODS[name]
    alone = fed.Server(method, torch.full((D,), 3.0))
    clients: dict[int, fed.Client] = {i: make_client(i) for i in range(N)}
    if isinstance(method, fed.clip21.ClippedMessages):
        clients = {i: method.worker(c, i, alone.x) for i, c in clients.items()}
    for _ in range(5):
        outcome = alone.round(clients)
    server = fed.Server(method, torch.full((D,), 3.0))
    result = start(server, Nodes(flower.client_app(method, make_client)))
    assert torch.equal(server.x, alone.x)
    (last,) = flower.unpack(result.arrays)
    assert torch.equal(last, alone.x)
    assert result.train_metrics_clientapp[5]["norm"] == outcome.norm
    assert server.taken == alone.taken


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("error", "failure"), ("late", "timeout"), ("shape", "shape"), ("nan", "nonfinite")],
)
@pytest.mark.usefixtures("in_process")
def test_bad_clients_are_left_out(fault: str, reason: str) -> None:
    method = METHODS["gdj"]
    alone = fed.Server(method, torch.full((D,), 3.0))
    for _ in range(3):
        alone.round({i: make_client(i) for i in (0, 1, 3)})
    server = fed.Server(method, torch.full((D,), 3.0), min_clients=3)
    with pytest.warns(RuntimeWarning, match="client 2 .*left out"):
        start(server, Nodes(flower.client_app(method, make_client), fault), 3)
    assert server.excluded == {reason: 3}
    assert torch.equal(server.x, alone.x)
    strict = fed.Server(method, torch.full((D,), 3.0), min_clients=4)
    with (
        pytest.warns(RuntimeWarning, match="left out"),
        pytest.raises(fed.NotEnoughClientsError),
    ):
        start(strict, Nodes(flower.client_app(method, make_client), fault), 3)


@pytest.mark.usefixtures("in_process")
def test_of_two_nodes_with_one_number_the_later_counts() -> None:
    method = METHODS["gdj"]
    alone = fed.Server(method, torch.full((D,), 3.0))
    alone.round({i: make_client(i) for i in (0, 1, 3)})
    server = fed.Server(method, torch.full((D,), 3.0))
    nodes = Nodes(flower.client_app(method, make_client))
    for context in nodes.contexts.values():
        if context.node_config["partition-id"] == 2:
            context.node_config["partition-id"] = 1
    with pytest.warns(RuntimeWarning, match=r"node \d+ is client 1, as is node \d+, .*left out"):
        start(server, nodes, 1)
    assert server.excluded == {"duplicate": 1}
    assert torch.equal(server.x, alone.x)


@pytest.mark.usefixtures("in_process")
def test_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    method = METHODS["rr-cli"]
    app = flower.client_app(method, make_client)
    whole = fed.Server(method, torch.full((D,), 3.0))
    start(whole, Nodes(app), 7)
    first = fed.Server(method, torch.full((D,), 3.0))
    start(first, Nodes(app), 3)
    torch.save(first.state_dict(), tmp_path / "server")
    second = fed.Server(method, torch.zeros(D))
    second.load_state_dict(torch.load(tmp_path / "server", weights_only=True))
    start(second, Nodes(app), 4)
    assert torch.equal(second.x, whole.x)


def simulate(
    server: fed.Server, make: Any, rounds: int, *, count: int = N, timeout: float = 300.0
) -> None:
    """Flower's own engine: clients are processes of ray, and keep nothing but their contexts."""
    pytest.importorskip("ray")
    from flwr.simulation import run_simulation

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        # Ray's processes take their time to begin on a machine that has other work.
        flower.strategy(server, clients=count, timeout=300.0).start(
            grid=grid,
            initial_arrays=flower.pack((server.x,)),
            num_rounds=rounds,
            timeout=timeout,
        )

    run_simulation(
        server_app=app,
        client_app=flower.client_app(server.method, make),
        num_supernodes=count,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


def test_in_the_simulation_engine(tmp_path: Path) -> None:
    """The bits of a run without Flower, with a server that is resumed in between."""
    method = METHODS["clip21"]
    alone = fed.Server(method, torch.full((D,), 3.0))
    workers = {i: method.worker(make_client(i), i, alone.x) for i in range(N)}  # type: ignore[attr-defined]
    for _ in range(3):
        alone.round(workers)
    server = fed.Server(method, torch.full((D,), 3.0))
    simulate(server, make_client, 3)
    assert server.state.rounds == 3
    assert torch.equal(server.x, alone.x)

    method = METHODS["rr-cli"]
    whole = fed.Server(method, torch.full((D,), 3.0))
    for _ in range(3):
        whole.round({i: make_client(i) for i in range(N)})
    first, second = (fed.Server(method, torch.full((D,), x)) for x in (3.0, 0.0))
    simulate(first, make_client, 1)
    torch.save(first.state_dict(), tmp_path / "server")
    second.load_state_dict(torch.load(tmp_path / "server", weights_only=True))
    simulate(second, make_client, 2)
    assert torch.equal(second.x, whole.x)


def test_faults_in_the_simulation_engine(tmp_path: Path) -> None:
    """In the first round one client raises, one is late, one sends NaN and one a wrong shape."""
    seen = tmp_path / "asked"
    seen.mkdir()

    def faulty(number: int) -> fed.FunctionClient:
        good = make_client(number)

        def grad(x: Tensor, batch: Tensor | None) -> Tensor:
            first = not (seen / str(number)).exists()
            (seen / str(number)).touch()
            if first and number == 1:
                raise OSError("its disk is full")
            if first and number == 2:
                time.sleep(40)
            if first and number == 3:
                return x * float("nan")
            if first and number == 4:
                return torch.zeros(1)
            return good.grad(x, batch)

        return fed.FunctionClient(grad, good.samples)

    method = fed.MeritFed(lr=1e-3, clients=6, target=lambda y, k: y)
    alone = fed.Server(method, torch.full((D,), 3.0))
    alone.round({i: make_client(i) for i in (0, 5)})
    alone.round({i: make_client(i) for i in range(6)})
    server = fed.Server(method, torch.full((D,), 3.0), min_clients=2)
    with pytest.warns(RuntimeWarning, match="left out"):
        simulate(server, faulty, 2, count=6, timeout=20.0)
    assert server.excluded == {"failure": 1, "timeout": 1, "nonfinite": 1, "shape": 1}
    assert server.taken == dict.fromkeys(range(6), 1)
    assert torch.equal(server.x, alone.x)


def test_without_flower_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(ImportError, match=r"flwr, .* pip install 'pysmooth\[federated\]'"):
        flower.client_app(METHODS["gdj"], make_client)
