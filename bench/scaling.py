"""How the cost of a step grows: with parameters, with tensors, with threads.

Each point is a race of pysmooth and rivals, interleaved. A step at the memory floor costs the same
per parameter at every size beyond the caches; below them, the cost of a call is what remains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import host, packages
from .methods import METHODS, Method, make_problem
from .models import MODELS, Shape, numel
from .timing import device_clock, interleave, ratio

TENSORS = 16  # of equal size, in the series over parameters
RIVALS = ("torch foreach", "torch fused", "eager", "eager in place")
SIZES = tuple(10**e for e in range(3, 10))
COUNTS = (1, 10, 100, 1_000, 10_000)


def measure(
    methods: Iterable[str], device: str, largest: int, seconds: float, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The three series. Sizes beyond `largest` parameters or the memory at hand are left out."""
    threads: list[dict[str, Any]] = []
    chosen = [METHODS[name] for name in methods]
    sizes = []
    for method in chosen:
        for size in SIZES:
            if size > largest or _bytes(method, size) > 0.8 * _available(device):
                continue
            say(f"scaling: {method.name}, {size:,} parameters")
            shapes: list[Shape] = [(size // TENSORS,)] * (TENSORS - 1)
            shapes.append((size - numel(shapes),))
            sizes.append({"x": size, **_race(method, shapes, device, seconds)})
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
                    found = _race(method, MODELS["resnet50"](), device, seconds)
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
    return [n for n in method.rivals if n in RIVALS and packages.present(n, device)]


def _bytes(method: Method, size: int) -> float:
    """Parameters, gradients and what every contestant keeps."""
    contestants = 1 + len(_rivals(method, "cpu"))
    return 4.0 * size * (2 + method.clips + 1 + contestants * method.states)


def _available(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")


def _race(method: Method, shapes: list[Shape], device: str, seconds: float) -> dict[str, Any]:
    problem = make_problem(shapes, method, method.dtype or "fp32", device)
    contestants: dict[str, Callable[[], object]] = {"pysmooth": method.ours(problem)[0]}
    for name in _rivals(method, device):
        contestants[name] = method.rivals[name](problem)
    timed = interleave(
        contestants,
        rounds=200,
        clock=device_clock(device),
        prepare=problem.restore,
        seconds=seconds,
    )
    return {
        "method": method.name,
        "seconds": {name: t.median for name, t in timed.items()},
        "ratio": {n: ratio(t, timed["pysmooth"]) for n, t in timed.items() if n != "pysmooth"},
    }
