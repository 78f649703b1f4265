"""One round as a transport would run it: prints the peak of memory above the server's own state.

python federated_scale.py CLIENTS PARAMETERS FOLDER [METHOD]   (FOLDER "memory": nothing is spilled)

Prints bytes above the state, bytes on disk, seconds, and bytes of the state.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pysmooth import federated as fed


def methods(clients: int) -> dict[str, fed.Method]:
    """One of each, by name."""

    def target(y: torch.Tensor, k: int) -> torch.Tensor:
        return y.clone()  # a vector of its own, as a gradient is

    merit: dict[str, Any] = {"lr": 1e-3, "inner_steps": 2, "clients": clients, "target": target}
    return {
        "CLERR": fed.CLERR(c0=1.0, c1=1.0),
        "CLERR, exact": fed.CLERR(c0=1.0, c1=1.0, norm_source="exact"),
        "ClipLocalGDJ": fed.ClipLocalGDJ(c0=1.0, c1=1.0),
        "ClippedRRCLI": fed.ClippedRRCLI(c0=1.0, c1=1.0, cohort=clients),
        "ClippedRRCLI, exact": fed.ClippedRRCLI(
            c0=1.0, c1=1.0, cohort=clients, norm_source="exact"
        ),
        "FedAvg": fed.FedAvg(),
        "CEFedAvg": fed.CEFedAvg(),
        "CELGC": fed.CELGC(),
        "ClipSGD": fed.ClipSGD(),
        "Clip21SGD2M": fed.Clip21SGD2M(),
        "MeritFed": fed.MeritFed(**merit),
        "MeritOpt": fed.MeritOpt(**merit),
    }


def anonymous() -> int:
    """Bytes of memory that are no file's."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def one_round(server: fed.Server, clients: int) -> tuple[int, float]:
    """Bytes on disk, and seconds."""
    size, method = len(server.x), server.method
    uploads = server.uploads()
    began = time.perf_counter()
    for i in method.participants(server.state, range(clients)):
        server.take(uploads, i, tuple(torch.full((size,), 1.0 + i) for _ in range(method.parts)))
    held = 0 if uploads._file is None else os.fstat(uploads._file).st_size
    server.finish(uploads, clients)
    return held, time.perf_counter() - began


def main(clients: int, size: int, folder: str, name: str = "CLERR") -> None:
    where = None if folder == "memory" else folder
    method = methods(clients)[name]
    one_round(fed.Server(method, torch.zeros(1000)), clients)  # threads, libraries
    server = fed.Server(method, torch.zeros(size), folder=where)
    state = sum(
        v.numel() * v.itemsize
        for v in server.state.state_dict().values()
        if isinstance(v, torch.Tensor)
    )
    peak, done = anonymous(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    held, took = one_round(server, clients)
    done.set()
    watcher.join()
    print(peak - before, held, took, state)
    if name != "CLERR":
        assert bool(server.x.isfinite().all())
        assert bool(server.x.any())
        return
    mean = (clients + 1) / 2
    expected = -mean / (1 + mean * size**0.5)
    torch.testing.assert_close(float(server.x[-1]), expected, rtol=1e-5, atol=0)


main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
