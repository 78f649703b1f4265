"""Starts the ranks of a task, on a shaped link or on the machine's own loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .link import Link
from .worker import Task


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(task: Task, ranks: int, rate: str | None, seconds: float = 900.0) -> dict[str, Any]:
    """Runs a task and returns what its first rank found.

    Args:
        task: what to do; `interface` and `out` are filled in here.
        ranks: processes.
        rate: of each rank's cable ("1gbit"); None for the loopback device as it is.
        seconds: after which the ranks are given up.

    Raises:
        LinkUnavailableError: if such a link cannot be made here.
        RuntimeError: if a rank fails or the time is over.
    """
    if rate is None:
        return _launch(replace(task, interface="lo"), ranks, None, seconds)
    with closing(Link(ranks, rate).open()) as link:
        return _launch(replace(task, interface=link.interface), ranks, link, seconds)


def _launch(task: Task, ranks: int, link: Link | None, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        task = replace(task, out=str(Path(folder) / "found.json"))
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        environment = {
            **os.environ,
            "PYSMOOTH_COMM_TASK": json.dumps(asdict(task)),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": link.address if link else "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "GLOO_SOCKET_IFNAME": task.interface,
            "OMP_NUM_THREADS": "1",
        }
        processes = []
        for rank, log in enumerate(logs):
            command = [*(link.inside(rank) if link else []), sys.executable]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [*command, "-m", "pysmooth.bench.comm.worker"],
                        env={**environment, "RANK": str(rank)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(timeout=seconds) for process in processes]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the ranks were not done after {seconds:.0f} s") from error
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank, code in enumerate(codes):
            if code != 0:
                raise RuntimeError(f"rank {rank} failed:\n{logs[rank].read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(Path(task.out).read_text())
    if link is None:  # what all ranks sent went over one device
        for row in found.get("race", {}).values():
            row["sent"] /= ranks
    return found
