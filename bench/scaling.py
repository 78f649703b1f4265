"""How the cost of a step grows: with parameters, with tensors, with threads.

Each point is a race of pysmooth and rivals, interleaved. A step at the memory floor costs the same
per parameter at every size beyond the caches; below them, the cost of a call is what remains. Where
not all fit into memory, rivals are left out, the least of them first; pysmooth alone has no ratio.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import host, packages
from .methods import METHODS, Method, make_problem
from .models import MODELS, Shape, numel
from .timing import device_clock, interleave, ratio

MEMINFO = Path("/proc/meminfo")
TENSORS = 16  # of equal size, in the series over parameters
# The fastest first. Others than the fused one hold copies of the model during a step.
RIVALS = ("torch fused", "torch foreach", "eager in place", "eager")
COPIES = 2
SIZES = tuple(10**e for e in range(3, 10))
COUNTS = (1, 10, 100, 1_000, 10_000)


def measure(
    methods: Iterable[str], device: str, largest: int, seconds: float, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The three series. Sizes beyond `largest`, or the memory for pysmooth alone, are left out."""
    threads: list[dict[str, Any]] = []
    chosen = [METHODS[name] for name in methods]
    sizes = []
    for method in chosen:
        for size in SIZES:
            names = _fitting(method, size, device)
            if size > largest or names is None:
                continue
            say(f"scaling: {method.name}, {size:,} parameters")
            shapes: list[Shape] = [(size // TENSORS,)] * (TENSORS - 1)
            shapes.append((size - numel(shapes),))
            sizes.append({"x": size, **_race(method, shapes, names, device, seconds)})
    tensors = []
    for count in COUNTS:
        say(f"scaling: {count:,} tensors")
        found = host.measure([(64,)] * count, device)
        tensors.append({"x": count, "method": "clip_sgd_momentum", **found})
    if device == "cpu":
        before = torch.get_num_threads()
        try:
            for count in _threads(os.cpu_count() or 1):
                torch.set_num_threads(count)
                for method in chosen:
                    say(f"scaling: {method.name}, {count} threads")
                    names = _rivals(method, device)
                    found = _race(method, MODELS["resnet50"](), names, device, seconds)
                    threads.append({"x": count, **found})
        finally:
            torch.set_num_threads(before)
    return {"parameters": sizes, "tensors": tensors, "threads": threads}


def flatness(series: dict[str, list[dict[str, Any]]], beyond: int = 10**7) -> dict[str, float]:
    """By method: the dearest parameter's cost over the cheapest's, at sizes beyond the caches."""
    costs: dict[str, list[float]] = {}
    for point in series["parameters"]:
        if point["x"] >= beyond:
            cost = point["seconds"]["pysmooth"] / point["x"]
            costs.setdefault(point["method"], []).append(cost)
    return {method: max(c) / min(c) for method, c in costs.items()}


def _threads(cores: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({cores, *(1 << e for e in range(cores.bit_length()) if 1 << e <= cores)})


def _rivals(method: Method, device: str) -> list[str]:
    return [n for n in RIVALS if n in method.rivals and packages.present(n, device)]


def _fitting(method: Method, size: int, device: str) -> list[str] | None:
    """The rivals for which there is memory beside pysmooth; None if there is none for pysmooth."""
    names = _rivals(method, device)
    room = 0.8 * _available(device)
    while names and _bytes(method, size, names) > room:
        names.pop()
    return None if _bytes(method, size, names) > room else names


def _bytes(method: Method, size: int, names: list[str]) -> float:
    """Parameters, gradients, what every contestant keeps, and what one holds during a step."""
    held = COPIES if set(names) - {"torch fused"} else 0
    return 4.0 * size * (2 + (1 + len(names)) * method.states + held)


def _available(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[0])
    if MEMINFO.exists():  # with what the kernel would give up for it
        lines = MEMINFO.read_text().splitlines()
        return next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")


def _race(
    method: Method, shapes: list[Shape], names: list[str], device: str, seconds: float
) -> dict[str, Any]:
    # Nothing is clipped: that costs the same, and spares a copy of the gradients.
    unclipped = replace(method, clips=False)
    problem = make_problem(shapes, unclipped, method.dtype or "fp32", device)
    contestants: dict[str, Callable[[], object]] = {"pysmooth": method.ours(problem)[0]}
    contestants |= {name: method.rivals[name](problem) for name in names}
    timed = interleave(contestants, rounds=200, clock=device_clock(device), seconds=seconds)
    return {
        "method": method.name,
        "seconds": {name: t.median for name, t in timed.items()},
        "ratio": {n: ratio(t, timed["pysmooth"]) for n, t in timed.items() if n != "pysmooth"},
    }
