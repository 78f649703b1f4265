"""The methods under Flower: a strategy for its server, and an app for its clients.

    strategy = flower.strategy(Server(method, x))      # in a ServerApp: strategy.start(grid, ...)
    app = flower.client_app(method, make_client)       # the ClientApp

Needs `pip install 'pysmooth[federated]'`; Flower is imported when either is made.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._extras import needs
from .clients import Client, Task
from .clip21 import ClippedMessages, Worker
from .method import Method, Upload, check_count
from .server import Server

_ARRAYS, _CONFIG, _METRICS, _STATE = "arrays", "config", "metrics", "pysmooth"


def _flwr() -> Any:
    return needs("flwr.app", extra="federated")


def pack(vectors: Upload) -> Any:
    """Vectors as Flower sends them.

    Args:
        vectors: of a message, in order.
    """
    named = {str(i): v for i, v in enumerate(vectors)}
    return _flwr().ArrayRecord(torch_state_dict=named)


def unpack(record: Any) -> tuple[Tensor, ...]:
    """What `pack` was given.

    Args:
        record: Flower's ArrayRecord.
    """
    named = record.to_torch_state_dict()
    return tuple(named[str(i)] for i in range(len(named)))


def strategy(server: Server, *, clients: int | None = None, timeout: float = 60.0) -> Any:
    """A Flower strategy that runs a server's method, round by round.

    Clients are numbered by Flower's `partition-id`, which each is asked for once: who is who does
    not depend on the order in which they connect. The first round waits until `clients` have
    connected, those that follow until `min_clients` are there, `timeout` seconds at most. A client
    that reports an error, does not answer within the time that `start` is given, or sends what
    cannot be taken is left out as by `Server.round`; so is the earlier of two nodes with the same
    number; too few raise `NotEnoughClientsError`.

    Args:
        server: its state is what clients get, whatever arrays `start` is given; its `timeout` does
            not count.
        clients: how many are expected; by default the server's `min_clients`. Methods that cut
            clients into cohorts, or whose bits are to be those of another run, need all.
        timeout: seconds to wait for them, and for a client to tell its number.

    Returns:
        A `flwr.serverapp.strategy.Strategy`. `start` returns the parameters as array "0", and in
        its metrics norm and step of each round.

    Raises:
        ImportError: Flower is not installed.
        ValueError: `clients` is not an integer of at least 1.
    """
    flwr = _flwr()
    check_count("clients", clients)
    base: Any = needs("flwr.serverapp.strategy", extra="federated").Strategy

    class Strategy(base):  # type: ignore[misc]
        """Runs `Server`'s method."""

        def __init__(self) -> None:
            self.server = server
            self._numbers: dict[int, int] = {}
            self._asked: list[int] = []
            self._expected = clients or server.min_clients

        def summary(self) -> None:
            """Nothing to say."""

        def _connected(self, grid: Any) -> set[int]:
            """Who is there, once as many are as should be, or it is too late for them."""
            deadline = time.monotonic() + timeout
            while len(nodes := set(grid.get_node_ids())) < self._expected:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            self._expected = server.min_clients
            return nodes

        def _number(self, grid: Any) -> dict[int, int]:
            """The nodes by number."""
            nodes = self._connected(grid)
            empty = flwr.RecordDict()
            new = [
                flwr.Message(content=empty, message_type="query", dst_node_id=node)
                for node in sorted(nodes - self._numbers.keys())
            ]
            if new:
                silent = {message.metadata.dst_node_id for message in new}
                told: dict[int, int] = {}
                for answer in grid.send_and_receive(new, timeout=timeout):
                    node = answer.metadata.src_node_id
                    silent.discard(node)
                    try:
                        told[node] = int(answer.content[_METRICS]["number"])
                    except (KeyError, TypeError, ValueError) as error:
                        why = answer.error.reason if answer.has_error() else repr(error)
                        server.leave_out("failure", f"node {node} told no number: {why}")
                self._numbers |= dict(sorted(told.items()))  # whoever answers first
                for node in sorted(silent):
                    server.leave_out("timeout", f"node {node} told no number in {timeout} s")
            out: dict[int, int] = {}
            for node, number in self._numbers.items():
                if node not in nodes:
                    continue
                if number in out:
                    why = f"node {out[number]} is client {number}, as is node {node}, asked later"
                    server.leave_out("duplicate", why)
                out[number] = node
            return out

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            """A message to each participant."""
            nodes = self._number(grid)
            if not nodes:
                self._asked = []
                return []
            self._asked = server.method.participants(server.state, sorted(nodes))
            sent = pack(server.method.sent(server.state))
            out = []
            for number in self._asked:
                task = server.task(number)
                told = {"client": task.client, "round": task.round, "taken": task.taken}
                content = flwr.RecordDict({_ARRAYS: sent, _CONFIG: flwr.ConfigRecord(told)})
                out.append(
                    flwr.Message(content=content, message_type="train", dst_node_id=nodes[number])
                )
            return out

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
            """Sums up what came, in the order of numbers, and moves."""
            uploads, missing = server.uploads(), set(self._asked)
            for reply in replies:
                number = self._numbers[reply.metadata.src_node_id]
                missing.discard(number)
                if reply.has_error():
                    server.take(uploads, number, RuntimeError(reply.error.reason))
                    continue
                try:
                    answer: Any = unpack(reply.content[_ARRAYS])
                    samples = int(reply.content[_METRICS]["samples"])
                except (KeyError, TypeError, ValueError) as error:
                    answer, samples = error, 1
                server.take(uploads, number, answer, samples)
            for number in sorted(missing):
                server.take(uploads, number, TimeoutError("no answer"))
            outcome = server.finish(uploads, len(self._asked))
            metrics = {**outcome._asdict(), "taken": len(uploads)}
            return pack((server.x,)), flwr.MetricRecord(metrics)

        def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            """Clients evaluate nothing; `start` takes an `evaluate_fn`."""
            return []

        def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> None:
            """Nothing."""

    return Strategy()


def client_app(method: Method, make_client: Callable[[int], Client]) -> Any:
    """Flower's ClientApp for a method.

    Args:
        method: the server's.
        make_client: the client of a number, from 0 (Flower's `partition-id`). It is called for
            every message: Flower's engines keep nothing but what is in a context. What a client of
            `Clip21SGD2M` keeps goes there.

    Returns:
        A `flwr.clientapp.ClientApp`.

    Raises:
        ImportError: Flower is not installed.
    """
    flwr = _flwr()
    app: Any = needs("flwr.clientapp", extra="federated").ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def number(message: Any, context: Any) -> Any:
        told = flwr.MetricRecord({"number": int(context.node_config["partition-id"])})
        return flwr.Message(flwr.RecordDict({_METRICS: told}), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        config = message.content[_CONFIG]
        task = Task(*(int(config[key]) for key in ("client", "round", "taken")))
        received = unpack(message.content[_ARRAYS])
        client = make_client(task.client)
        if isinstance(method, ClippedMessages):
            client = method.worker(client, task.client, received[0])
            if _STATE in context.state:
                saved = io.BytesIO(context.state[_STATE]["worker"])
                client.load_state_dict(torch.load(saved, weights_only=True))
        answer = method.reply(task, received, client)
        if isinstance(client, Worker):
            kept = io.BytesIO()
            torch.save(client.state_dict(), kept)
            context.state[_STATE] = flwr.ConfigRecord({"worker": kept.getvalue()})
        told = flwr.MetricRecord({"samples": client.samples})
        content = flwr.RecordDict({_ARRAYS: pack(answer), _METRICS: told})
        return flwr.Message(content, reply_to=message)

    return app
