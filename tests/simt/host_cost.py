"""What a step of the CUDA backend costs the host, without a GPU.

In tests/: `python -m simt.host_cost`. The real engine and bindings, CPU tensors for device memory;
the stub of the runtime counts launches, and never runs them. A driver would take a few microseconds
more for each.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from pysmooth.bench.launching import host_rivals
from pysmooth.bench.models import MODELS

import pysmooth
from pysmooth.engine.cuda import CudaEngine

from . import emulated

ROUNDS = 100


def microseconds(step: Callable[[], object], params: list[torch.nn.Parameter]) -> float:
    """The median over steps, each with gradients that a backward has just made."""
    lib = emulated.kernels()
    factors = [torch.randn_like(p) for p in params]
    times = []
    for n in range(ROUNDS + 3):
        for p in params:
            p.grad = None
        products = [(p * x).sum() for p, x in zip(params, factors, strict=True)]
        torch.stack(products).sum().backward()  # type: ignore[no-untyped-call]
        lib.runtime_drop(n >= 3)  # the first ones run
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    lib.runtime_drop(0)
    return statistics.median(times[3:]) * 1e6


def main() -> None:
    """A line per model and optimizer, and what torch does on the host beside them."""
    sys.modules["pysmooth._cuda"] = emulated.module()
    engine: Any = CudaEngine
    engine.settled = lambda *_: None  # as on a GPU: nobody looks at what a step has done
    for model in ("resnet20", "gpt2-124m", "many-tiny"):
        params = [torch.nn.Parameter(torch.randn(16)) for _ in MODELS[model]()]
        for make in (pysmooth.ClipSGD, pysmooth.AdamW):
            kwargs = {"momentum": 0.9} if make is pysmooth.ClipSGD else {}
            optimizer = make(params, 1e-9, max_norm=1.0, backend="cuda", **kwargs)
            before = emulated.calls()
            took = microseconds(optimizer.step, params)
            each = (emulated.calls().launches - before.launches) / (ROUNDS + 3)
            print(f"{make.__name__}, {len(params)} tensors: {took:.0f} us, {each:.1f} launches")
        for name, step in host_rivals(params).items():
            print(f"  beside it {name}: {microseconds(step, params):.0f} us")


if __name__ == "__main__":
    main()
