"""One round as a transport would run it: prints the peak of memory above the server's own state.

python federated_scale.py CLIENTS PARAMETERS FOLDER   (FOLDER "memory": nothing is spilled)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import torch

from pysmooth import federated as fed


def anonymous() -> int:
    """Bytes of memory that are no file's."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(clients: int, size: int, folder: str) -> None:
    where = None if folder == "memory" else folder
    server = fed.Server(fed.CLERR(c0=1.0, c1=1.0), torch.zeros(size), folder=where)
    warm = fed.Server(fed.CLERR(), torch.zeros(1000))
    warm.round({0: fed.FunctionClient(lambda x, batch: x)})  # threads, libraries
    peak, done = anonymous(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    uploads = server.uploads()
    began = time.perf_counter()
    for i in range(clients):
        server.take(uploads, i, (torch.full((size,), 1.0 + i),))
    held = 0 if uploads._file is None else os.fstat(uploads._file).st_size
    server.finish(uploads, clients)
    took = time.perf_counter() - began
    done.set()
    watcher.join()
    print(peak - before, held, took)
    mean = (clients + 1) / 2
    expected = -mean / (1 + mean * size**0.5)
    torch.testing.assert_close(float(server.x[-1]), expected, rtol=1e-5, atol=0)


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
