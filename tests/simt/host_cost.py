"""What a step of the CUDA backend costs the host, without a GPU.

In tests/: `python -m simt.host_cost`. The real engine and bindings, CPU tensors for device memory;
launches are kept by the stub of the runtime, as for a graph, and never run. A driver would take a
few microseconds more for each.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from pysmooth.bench.models import MODELS

import pysmooth

from . import emulated

ROUNDS = 100


def microseconds(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> float:
    """The median over steps, each with gradients that a backward has just made."""
    lib = emulated.kernels()
    factors = [torch.randn_like(p) for p in params]
    times = []
    for n in range(ROUNDS + 3):
        optimizer.zero_grad()
        products = [(p * x).sum() for p, x in zip(params, factors, strict=True)]
        torch.stack(products).sum().backward()  # type: ignore[no-untyped-call]
        lib.runtime_capture(n >= 3)  # forgets those of the last step; the first ones run
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    lib.runtime_capture(0)
    return statistics.median(times[3:]) * 1e6


def main() -> None:
    """A line per model and optimizer."""
    sys.modules["pysmooth._cuda"] = emulated.module()
    for model in ("resnet20", "gpt2-124m", "many-tiny"):
        for make in (pysmooth.ClipSGD, pysmooth.AdamW):
            params = [torch.nn.Parameter(torch.randn(16)) for _ in MODELS[model]()]
            kwargs = {"momentum": 0.9} if make is pysmooth.ClipSGD else {}
            optimizer = make(params, 1e-9, max_norm=1.0, backend="cuda", **kwargs)
            before = emulated.calls()
            took = microseconds(optimizer, params)
            each = (emulated.calls().launches - before.launches) / (ROUNDS + 3)
            print(f"{make.__name__}, {len(params)} tensors: {took:.0f} us, {each:.1f} launches")


if __name__ == "__main__":
    main()
