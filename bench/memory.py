"""Memory that a step takes, measured from outside: one process per contestant.

On a CPU the process's resident memory, on a GPU what torch's allocator counted, beyond parameters
and gradients, in bytes per parameter:

- state: the tensors that the optimizer keeps, counted;
- kept: how much the process has grown after the first step, which has also what is not a tensor;
- peak: kept, and the most that a later step holds besides.

A compiled contestant's process also holds its compiler, so that only its state is given, and what a
later step holds besides. (Linux: the peak of a process is reset through /proc.)
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import packages, rivals
from .methods import METHODS, make_problem
from .models import MODELS, numel

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(method: str, model: str, device: str, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """A row for pysmooth and each of the method's rivals among the chosen.

    One that fails has an "error" instead of figures.
    """
    if not device.startswith("cuda") and not RESET.exists():
        return []
    names = [n for n in METHODS[method].rivals if packages.present(n, device)]
    if METHODS[method].compiled is not None:
        names.append(rivals.COMPILED)
    names = ["pysmooth", *(n for n in names if n in chosen)]
    rows: list[dict[str, Any]] = []
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, method, name, model, device]
        done = subprocess.run(command, capture_output=True, text=True)
        row = {"method": method, "model": model, "contestant": name}
        if done.returncode == 0:
            rows.append({**row, **json.loads(done.stdout.splitlines()[-1])})
        else:
            lines = done.stderr.strip().splitlines()
            rows.append({**row, "error": lines[-1] if lines else f"exit code {done.returncode}"})
    return rows


def alone(method: str, contestant: str, model: str, device: str) -> dict[str, float | None]:
    """The figures of one contestant, in a process that has done nothing else."""
    shapes = MODELS[model]()
    made = METHODS[method]
    problem = make_problem(shapes, made, made.dtype or "fp32", device)
    compiled = contestant == rivals.COMPILED
    base = _now(device)
    if contestant == "pysmooth":
        step, _ = made.ours(problem)
    elif compiled:
        assert made.compiled is not None
        step, _ = made.compiled(problem)
    else:
        step = made.rivals[contestant](problem)
    step()
    kept = _now(device)
    _reset_peak(device)
    for _ in range(3):
        problem.restore()
        step()
    extra = max(0, _peak(device) - kept)
    size = numel(shapes)
    keeps = getattr(step, "keeps", getattr(step, "__self__", None))
    return {
        "state": _bytes_of(keeps) / size,
        "kept": None if compiled else max(0, kept - base) / size,
        "peak": None if compiled else max(0, kept - base + extra) / size,
        "temporary": extra / size,
    }


def _now(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated())
    # What was freed goes back first, so that a big temporary does not count as kept.
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        RESET.write_text("5")


def _peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else _status("VmHWM")


def _status(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith(f"{key}:"))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
    elif hasattr(value, "__dict__"):  # what may be quantized is wrapped (bitsandbytes, flashoptim)
        kinds = (Tensor, dict, list, tuple)
        yield from _tensors([v for v in vars(value).values() if isinstance(v, kinds)])


def _bytes_of(keeps: Any) -> int:
    """Bytes of the distinct storages behind an optimizer's state, or behind lists of states."""
    state = dict(keeps.state) if isinstance(keeps, torch.optim.Optimizer) else keeps
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(state)}
    return sum(s.nbytes() for s in storages.values())


if __name__ == "__main__":
    print(json.dumps(alone(*sys.argv[1:])))
