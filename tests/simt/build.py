"""Compiles kernels for the host, together with the emulation that runs them.

A library is compiled again when anything that it may include has changed.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"),
    *(f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
]
EMULATION = ["simt.cpp", "memory.cpp", "race.cpp", "accesses.cpp"]


def _digest(flags: Sequence[str]) -> str:
    seen = hashlib.sha256(" ".join(flags).encode())
    for folder in (
        ROOT / "csrc" / "core",
        ROOT / "csrc" / "cuda",
        ROOT / "csrc" / "bindings",
        HERE,
    ):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                seen.update(path.name.encode() + path.read_bytes())
    return seen.hexdigest()[:16]


Source = tuple[str, Sequence[str]]


def library(name: str, kernels: Sequence[Source], others: Sequence[Source] = ()) -> ctypes.CDLL:
    """The library of that name: sources with kernels, and others, each with flags of its own.

    Kernels are compiled as if for a thread sanitizer, whose place tests/simt/accesses.cpp takes.
    With PYSMOOTH_SIMT_COVERAGE=1 gcc counts which of their lines run.
    """
    # Without optimisation: what is moved about is counted in the wrong lines.
    cover = ["--coverage", "-O0"] if os.environ.get("PYSMOOTH_SIMT_COVERAGE") == "1" else []
    work = ROOT / "build" / "simt" / f"{name}-{_digest([*FLAGS, *cover])}"
    target = work / f"{name}.so"
    work.mkdir(parents=True, exist_ok=True)
    # Several workers of one run of the tests want it at once, and one of them compiles.
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _compile(work, target, kernels, others, cover)
    return ctypes.CDLL(str(target))


def _compile(
    work: Path,
    target: Path,
    kernels: Sequence[Source],
    others: Sequence[Source],
    cover: Sequence[str],
) -> None:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    jobs: list[tuple[str, list[str]]] = [(str(HERE / source), []) for source in EMULATION]
    jobs += [(source, list(extra)) for source, extra in others]
    jobs += [(source, ["-fsanitize=thread", *cover, *extra]) for source, extra in kernels]

    def compile_one(job: tuple[int, tuple[str, list[str]]]) -> str:
        number, (source, extra) = job
        out = str(work / f"{number}.o")
        command = [*compiler, *FLAGS, *extra, "-x", "c++", "-c", source, "-o", out]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, enumerate(jobs)))
    fresh = work / f"{os.getpid()}.so"
    subprocess.run([*compiler, "-shared", *cover, *objects, "-o", str(fresh)], check=True)
    fresh.replace(target)
