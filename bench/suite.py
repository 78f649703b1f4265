"""Runs everything and collects one dictionary of results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from pysmooth import BackendError
from pysmooth.engine import available_backends
from pysmooth.engine.backends import REGISTERED, Backend

from . import (
    agreement,
    bandwidth,
    host,
    machine,
    memory,
    numerics,
    packages,
    rivals,
    scaling,
    selection,
)
from .methods import METHODS, Method, make_problem
from .models import MODELS, numel
from .timing import Timed, device_clock, interleave, ratio, ratio_quartiles

Progress = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]

# Large models of these are not compiled in a default run: clip_sgd_momentum shows what it is like.
LEFT_TO_MOMENTUM = ("clip_sgd", "clip_adagrad", "clip_adamw", "signum")

USUAL = ("training", "selection", "host", "speed", "numerics")
# What a sceptic asks besides: do all do the same work, in how much memory, at what sizes?
PARTS = (*USUAL, "agreement", "memory", "scaling")


@dataclass
class Options:
    """What to run. `seconds` bounds the whole; what does not fit is left out, and said so."""

    parts: tuple[str, ...] = USUAL
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    models: list[str] = field(default_factory=lambda: ["resnet20", "many-tiny", "gpt2-124m"])
    dtype: str = "fp32"
    device: str = "cpu"
    rivals: list[str] = field(default_factory=lambda: list(rivals.NAMES))
    eager: bool = False  # pysmooth's eager backend as a contestant, on small models
    compile_models: list[str] = field(default_factory=lambda: ["resnet20", "gpt2-124m"])
    memory_model: str = "resnet50"
    largest: int = 10**9  # parameters, in the series over sizes
    scaling_seconds: float = 2.0  # a point
    every_method: bool = False  # on every model, also where a default run leaves it out
    rounds: int = 15
    race_seconds: float = 25.0  # a race of one method on one model, at most
    end_to_end_seconds: float = 50.0
    seconds: float = 260.0
    # What compiling the hand-written step is allowed to cost, by model: seen 45 to 100 s for
    # GPT-2 on two cores. Started only if this much time is left.
    compile_reserve: float = 110.0


def empty_results(device: str) -> dict[str, Any]:
    """Every part of the results, with nothing measured but the environment."""
    return {
        "environment": machine.environment(device),
        "end_to_end": [],
        "bandwidth": {},
        "rows": [],
        "first_step": [],
        "host": [],
        "numerics": [],
        "agreement": [],
        "memory": [],
        "scaling": {},
        "selection": [],
        "left_out": [],
    }


def run_suite(
    options: Options, progress: Progress, keep: Keep = lambda results: None
) -> dict[str, Any]:
    """The chosen parts, in the order of their importance to a reader.

    keep() is called with what there is after every race: somebody may end this at any time.
    """
    began = time.perf_counter()

    def left() -> float:
        return options.seconds - (time.perf_counter() - began)

    results = empty_results(options.device)
    parts = options.parts
    if "training" in parts and options.end_to_end_seconds > 0:
        from .end_to_end import run_all

        results["end_to_end"] = run_all(options.end_to_end_seconds, progress)
    if "selection" in parts and _selects(options):
        progress("top-k: second looks")
        results["selection"] = selection.measure()
    for model in ("many-tiny", "resnet20") if "host" in parts else ():
        if model in options.models:
            progress(f"host cost: {model}")
            results["host"].append(host.per_tensor(model, MODELS[model](), options.device))
    if "speed" in parts:
        _speed(results, options, left, progress, keep)
    if "numerics" in parts:
        progress("numerics against float64")
        results["numerics"] = numerics.compare(options.methods, options.device)
    if "agreement" in parts:
        progress("agreement of the contestants")
        compiled = rivals.COMPILED in options.rivals
        results["agreement"] = agreement.measure(
            options.methods, options.device, compiled, results["left_out"]
        )
    for name in options.methods if "memory" in parts else ():
        progress(f"memory: {name}")
        results["memory"] += memory.measure(
            name, options.memory_model, options.device, options.rivals
        )
    if "scaling" in parts:
        results["scaling"] = scaling.measure(
            options.methods, options.device, options.largest, options.scaling_seconds, progress
        )
    results["environment"]["seconds"] = f"{time.perf_counter() - began:.0f}"
    return results


def _selects(options: Options) -> bool:
    top_k = any("top-k" in name for name in options.methods)
    return top_k and options.device == "cpu" and "cpu" in available_backends()


def _speed(
    results: dict[str, Any],
    options: Options,
    left: Callable[[], float],
    progress: Progress,
    keep: Keep,
) -> None:
    """The races of all methods on all models, and the bandwidth beside those of the last."""
    results["left_out"] += packages.left_out(options.device)

    def look_at_bandwidth() -> None:
        progress("bandwidth")
        size = numel(MODELS[options.models[-1]]())
        results["bandwidth"] = measure_bandwidth(size, options)

    on_cpu = options.device == "cpu"
    if not on_cpu:  # a second, and races mean little without it
        look_at_bandwidth()
    for model in options.models:
        for name in options.methods:
            usual = METHODS[name].models
            if not options.every_method and usual is not None and model not in usual:
                continue
            progress(f"{name}: {model}")
            row = measure(METHODS[name], model, options, left, results["left_out"])
            results["rows"].append(row)
            if "first_step" in row:
                results["first_step"].append(row.pop("first_step"))
            keep(results)
    if on_cpu:
        look_at_bandwidth()


def measure(
    method: Method,
    model: str,
    options: Options,
    left: Callable[[], float],
    left_out: list[str],
) -> dict[str, Any]:
    """One method on one model: pysmooth, every rival, and the floor, interleaved."""
    shapes = MODELS[model]()
    dtype = method.dtype or options.dtype
    problem = make_problem(shapes, method, dtype, options.device)
    step, backend = method.ours(problem)
    clock = device_clock(options.device)
    start = clock()
    step()
    first = clock() - start

    contestants: dict[str, Callable[[], object]] = {"pysmooth": step}
    small = numel(shapes) < 10_000_000
    for other in other_backends(backend, problem.params, options.eager and small):
        try:
            made, runs = method.ours(replace(problem, backend=other))
            if runs == other:  # a function takes the one it likes
                contestants[f"pysmooth {other}"] = made
        except BackendError as error:
            left_out.append(f"{other} on {method.name}, {model}: {error}")
    for name, make in method.rivals.items():
        if name in options.rivals and packages.present(name, options.device):
            if packages.compiles(name) and model not in options.compile_models:
                left_out.append(f"{name} on {method.name}, {model}: it compiles, for minutes")
                continue
            try:
                contestants[name] = make(problem)
            except packages.MissingError as missing:
                left_out.append(str(missing))
    compile_s: float | None = None
    if method.compiled is not None and rivals.COMPILED in options.rivals:
        label = f"{rivals.COMPILED} on {method.name}, {model}"
        quick = small and len(shapes) < 500
        if model not in options.compile_models:
            left_out.append(f"{label}: compiling it takes minutes; --full runs it")
        elif not quick and left() < options.compile_reserve:
            left_out.append(
                f"{label}: {left():.0f} s left, compiling it may take more; --full runs it"
            )
        elif not quick and method.name in LEFT_TO_MOMENTUM and not options.every_method:
            left_out.append(f"{label}: left to clip_sgd_momentum; --full runs it")
        else:
            try:
                contestants[rivals.COMPILED], compile_s = method.compiled(problem)
            except Exception as error:  # the compiler's own, of any kind
                left_out.append(rivals.not_compiled(f"{method.name}, {model}", error))

    # The floor is measured in float32 on as many bytes as the method's own streams have.
    probes: dict[str, Callable[[], object]] = {}
    if dtype == "fp32":
        probes = bandwidth.Floor(numel(shapes), options.device).contestants(method)
    timed = interleave(
        {**contestants, **probes},
        rounds=options.rounds * (8 if small else 1),
        clock=clock,
        prepare=problem.restore,
        seconds=min(options.race_seconds, max(6.0, left() / 3)),
    )
    row = {
        "method": method.name,
        "model": model,
        "parameters": numel(shapes),
        "tensors": len(shapes),
        "dtype": dtype,
        "backend": backend,
        "streams": method.streams,
        "floor_ms": None,
        "roofline_fraction": None,
        "contestants": [_contestant(name, timed, compile_s) for name in contestants],
        "first_step": {
            "method": method.name,
            "model": model,
            "first_ms": first * 1e3,
            "later_ms": timed["pysmooth"].median * 1e3,
            "state_bytes": 4 * numel(shapes) * method.states,
        },
    }
    # A floor means something where memory is the limit, not where launching is.
    if probes and not small:
        seconds = bandwidth.floor_seconds(method, {n: timed[n].median for n in probes})
        row["floor_ms"] = seconds * 1e3
        row["roofline_fraction"] = seconds / timed["pysmooth"].median
    return row


def _contestant(name: str, timed: dict[str, Timed], compile_s: float | None) -> dict[str, Any]:
    low, high = ratio_quartiles(timed[name], timed["pysmooth"])
    return {
        "name": name,
        "median_ms": timed[name].median * 1e3,
        "iqr_ms": timed[name].iqr * 1e3,
        "ratio": ratio(timed[name], timed["pysmooth"]),
        "ratio_low": low,
        "ratio_high": high,
        "compile_s": compile_s if name == rivals.COMPILED else None,
    }


def measure_bandwidth(size: int, options: Options) -> dict[str, float]:
    """GB/s of reading, copying and updating in place, each by the best of several kernels."""
    floor = bandwidth.Floor(min(max(size, 1 << 22), 1 << 30), options.device)
    mixes = bandwidth.mix_names()
    probes = {n: run for mix in mixes.values() for n, run in floor.probes(mix).items()}
    probes |= bandwidth.copy_probes(floor)
    timed = interleave(probes, rounds=9, clock=device_clock(options.device), seconds=10)
    gigabytes = 4e-9 * floor.numel
    found = {
        label: (2 * rw + r)
        * gigabytes
        / min(t.median for n, t in timed.items() if n.startswith(f"floor {rw}rw+{r}r "))
        for label, (rw, r) in mixes.items()
    }
    copies = [t.median for n, t in timed.items() if n.startswith("copy ")]
    return {**found, "copy": 2 * gigabytes / min(copies)}


def other_backends(backend: str, params: list[Tensor], eager: bool = False) -> list[Backend]:
    """Backends beside the one that "auto" took, to be timed side by side."""
    kind = params[0].device.type
    return [
        cast(Backend, info.name)
        for info in REGISTERED
        if info.name != backend
        and info.missing() is None
        and (eager if info.name == "eager" else kind != "cpu" and kind in info.auto)
    ]


def claims(row: dict[str, Any]) -> bool:
    """Whether a row may claim a speed-up: rows that ran on the eager backend may not."""
    return bool(row["backend"] != "eager")


def set_threads(threads: int | None) -> None:
    """Sets torch's threads, which are pysmooth's as well."""
    if threads is not None:
        torch.set_num_threads(threads)
