"""Clients that fail; the server's memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pysmooth import federated as fed

SCALE = Path(__file__).parent / "federated_scale.py"


def toward(target: float) -> fed.FunctionClient:
    return fed.FunctionClient(lambda x, batch: x - target)


def failing(x: Tensor, batch: Tensor | None) -> Tensor:
    raise OSError("its disk is full")


FAULTS: dict[str, tuple[Any, str]] = {
    "raises": (failing, "failure"),
    "nan": (lambda x, batch: x * float("nan"), "nonfinite"),
    "inf": (lambda x, batch: x + float("inf"), "nonfinite"),
}


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_fails_is_left_out(fault: str, timeout: float | None) -> None:
    bad, reason = FAULTS[fault]
    clients = {i: toward(float(i)) for i in range(4)}
    without = fed.Server(fed.CLERR(c0=2.0, c1=0.5), torch.ones(3))
    without.round({i: c for i, c in clients.items() if i != 2})
    clients[2] = fed.FunctionClient(bad)
    server = fed.Server(fed.CLERR(c0=2.0, c1=0.5), torch.ones(3), timeout=timeout)
    with pytest.warns(RuntimeWarning, match="client 2 .*left out of this round"):
        server.round(clients)
    assert server.excluded == {reason: 1}
    assert server.taken == {0: 0, 1: 0, 3: 0}
    assert torch.equal(server.x, without.x)


class Wrong(fed.Method):
    """A method some of whose clients answer with something else."""

    def reply(self, task: fed.Task, received: Any, client: fed.Client) -> Any:
        return {0: (torch.ones(3),), 1: (torch.ones(4),), 2: torch.ones(3), 3: None}[task.client]

    def update(self, state: fed.State, uploads: fed.Uploads) -> fed.Outcome:
        assert uploads.clients == [0]
        return fed.Outcome(0.0, 0.0, 0.0)


def test_wrong_shapes_are_left_out() -> None:
    server = fed.Server(Wrong(), torch.ones(3))
    with pytest.warns(RuntimeWarning, match="left out"):
        server.round({i: toward(0.0) for i in range(4)})
    assert server.excluded == {"shape": 3}


def test_a_client_that_is_late_is_left_out() -> None:
    release, done = threading.Event(), threading.Event()

    def late(x: Tensor, batch: Tensor | None) -> Tensor:
        release.wait(60)
        done.set()
        return x

    clients = {0: toward(0.0), 1: fed.FunctionClient(late), 2: toward(2.0)}
    server = fed.Server(fed.FedAvg(lr=0.5), torch.ones(3), timeout=0.3)
    with pytest.warns(RuntimeWarning, match=r"client 1 .*TimeoutError.*0\.3 s"):
        server.round(clients)
    after = server.x.clone()
    assert server.excluded == {"timeout": 1}
    release.set()
    assert done.wait(60)
    assert torch.equal(server.x, after)


def test_a_client_that_is_still_late_is_not_asked_again() -> None:
    """Two rounds at once in one client would write over each other's parameters."""
    release, calls = threading.Event(), 0

    def late(x: Tensor, batch: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            release.wait(60)
        return x - 1

    clients = {0: toward(0.0), 1: fed.FunctionClient(late)}
    server = fed.Server(fed.FedAvg(lr=0.5), torch.ones(3), timeout=0.3)
    with pytest.warns(RuntimeWarning, match=r"client 1 .*0\.3 s"):
        server.round(clients)
    with pytest.warns(RuntimeWarning, match="client 1 .*not yet answered an earlier round"):
        server.round(clients)
    assert (calls, server.excluded, server.taken) == (1, {"timeout": 2}, {0: 1})
    release.set()
    deadline = time.monotonic() + 60
    while server._busy and time.monotonic() < deadline:
        time.sleep(0.01)
    server.timeout = 60.0
    server.round(clients)
    assert (calls, server.taken) == (2, {0: 2, 1: 2})


@pytest.mark.parametrize("method", ["MeritFed", "ClippedRRCLI"])
def test_an_update_that_fails_changes_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = True

    def target(y: Tensor, k: int) -> Tensor:
        if broken:
            raise OSError("no validation data")
        return y

    if method == "MeritFed":
        made: fed.Method = fed.MeritFed(clients=2, target=target)
    else:
        made = fed.ClippedRRCLI(cohort=2, norm_source="exact")
        real, reads = fed.Uploads._read, iter(range(100))

        def read(self: fed.Uploads, *args: Any) -> None:
            if broken and next(reads) >= len(clients):  # in the second sum
                raise OSError("no validation data")
            real(self, *args)

        monkeypatch.setattr(fed.Uploads, "_read", read)
    clients = {i: toward(float(i)) for i in range(2)}
    server = fed.Server(made, torch.ones(3), folder=tmp_path)
    twin = fed.Server(made, torch.ones(3))
    with pytest.raises(OSError, match="no validation data"):
        server.round(clients)
    assert (server.state.rounds, server.taken) == (0, {})
    broken = False
    server.round(clients)
    twin.round(clients)
    assert torch.equal(server.x, twin.x)
    assert server.taken == {0: 0, 1: 0}


def test_too_few_answers_change_nothing() -> None:
    clients = {0: toward(0.0), 1: fed.FunctionClient(failing), 2: fed.FunctionClient(failing)}
    server = fed.Server(fed.CLERR(), torch.ones(3), min_clients=2)
    with (
        pytest.warns(RuntimeWarning, match="left out"),
        pytest.raises(fed.NotEnoughClientsError, match=r"1 of 3 clients .* at least 2 must"),
    ):
        server.round(clients)
    assert torch.equal(server.x, torch.ones(3))
    assert (server.state.rounds, server.taken) == (0, {})
    assert server.excluded == {"failure": 2}
    clients[1] = toward(1.0)
    with pytest.warns(RuntimeWarning, match="client 2"):
        server.round(clients)
    assert server.state.rounds == 1


@pytest.mark.parametrize("method", ["ClipLocalGDJ", "CEFedAvg", "FedAvg"])
def test_the_rest_goes_on_for_many_rounds(method: str) -> None:
    """Every third answer is spoiled; those that count still lead where they should."""

    def flaky(number: int) -> fed.FunctionClient:
        calls = iter(range(10_000))

        def grad(x: Tensor, batch: Tensor | None) -> Tensor:
            return x - 1 if (next(calls) + number) % 3 else x * float("nan")

        return fed.FunctionClient(grad)

    make: Any = getattr(fed, method)
    server = fed.Server(make(lr=0.5), torch.zeros(3))
    clients = {i: flaky(i) for i in range(6)}

    def rounds() -> None:
        for _ in range(60):
            server.round(clients)

    with pytest.warns(RuntimeWarning, match="left out"):
        rounds()
    assert server.excluded["nonfinite"] == 120
    assert (server.x - 1).abs().max() < 1e-3


def _scale(*args: object) -> list[float]:
    root = SCALE.parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(SCALE), *map(str, args)],
        env=env, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


BLOCKS = 16e6  # bytes, whatever the number of clients and parameters


# Vectors: the server's state, what it needs beside, what a client sends. docs/methods/federated.md
KEPT = {
    "CLERR": (1, 2, 1),
    "CLERR, exact": (1, 2, 2),
    "ClippedRRCLI, exact": (4, 2, 2),
    "Clip21SGD2M": (2, 2, 1),
    "MeritFed": (1, 2, 1),
    "MeritOpt": (3, 3, 1),  # the step's derivative as well
}


@pytest.mark.parametrize("method", KEPT)
def test_the_server_keeps_two_vectors_beside_its_state(method: str, tmp_path: Path) -> None:
    clients, size = 4, 4_000_000
    vector = 4 * size
    own, beside, sent = KEPT[method]
    peak, held, _, state = _scale(clients, size, tmp_path, method)
    assert state == pytest.approx(own * vector, rel=1e-3)
    assert held == pytest.approx(clients * sent * vector)  # on disk
    assert peak <= beside * vector + BLOCKS


def test_what_is_held_in_memory_is_seen() -> None:
    assert _scale(6, 4_000_000, "memory")[0] > 6 * 4 * 4_000_000


@pytest.mark.slow
def test_a_hundred_clients_of_ten_million_parameters(tmp_path: Path) -> None:
    peak, held, _, _ = _scale(100, 10_000_000, tmp_path)
    assert held == pytest.approx(4e9)
    assert peak <= 2 * 4e7 + BLOCKS
