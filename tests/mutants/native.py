"""Faults of the native core's formulas, chosen by hand, compiled into one module.

A copy of csrc says `pysmooth_mutant == n ? fault : formula` where a mutant differs; PYSMOOTH_MUTANT
says which one a process is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from mutants.formulas import MUTANTS
from mutants.trial import passes

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
LIBRARY = WORK / "lib"
TESTS = [
    *(f"tests/test_{name}.py" for name in ("battery_numbers", "layouts", "kernels", "numerics")),
    *(f"tests/test_{name}.py" for name in ("norm_edges", "agc", "low_precision", "compressors")),
    *(
        f"tests/test_{name}.py"
        for name in ("battery_nonfinite", "faults_numbers", "theory_optim", "clip21")
    ),
]

# In a header that those with mutants include.
WHICH = """#pragma once
#include <cstdlib>
static const int pysmooth_mutant =
    std::getenv("PYSMOOTH_MUTANT") ? std::atoi(std::getenv("PYSMOOTH_MUTANT")) : 0;
"""


def build() -> None:
    """Compiles the core with all mutants in it: one instruction set, little optimisation."""
    shutil.rmtree(WORK / "csrc", ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, WORK / name)
    for name in ("csrc", "pysmooth", "bench", "triton_kernels"):
        skip = shutil.ignore_patterns("*.so", "__pycache__", *(["cuda"] if name == "csrc" else []))
        shutil.copytree(ROOT / name, WORK / name, ignore=skip, dirs_exist_ok=True)
    core = WORK / "csrc" / "core"
    (core / "mutant.h").write_text(WHICH)
    for header in {m.header for m in MUTANTS}:
        path = core / header
        once = "#pragma once\n"
        path.write_text(path.read_text().replace(once, f'{once}#include "core/mutant.h"\n', 1))
    for number, m in enumerate(MUTANTS, 1):
        path = core / m.header
        text = path.read_text()
        begin = text.index(m.formula, text.index(m.after))
        either = f"(pysmooth_mutant == {number} ? ({m.fault}) : ({m.formula}))"
        path.write_text(text[:begin] + either + text[begin + len(m.formula) :])
    flags = {"PYSMOOTH_LEVELS": "baseline", "PYSMOOTH_CUDA": "0", "PYSMOOTH_CXXFLAGS": "-O1"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "-b",
        "build",
        "--build-lib",
        str(LIBRARY),
    ]
    subprocess.run(command, cwd=WORK, env={**os.environ, **flags}, check=True)


def survivors() -> list[str]:
    """Builds, and runs every mutant."""
    build()
    tests = [*TESTS, "-k", "not eager and not leak and not compiled"]

    def become(number: int) -> None:
        os.environ["PYSMOOTH_MUTANT"] = str(number)
        sys.path.insert(0, str(LIBRARY))

    if not passes(lambda: become(0), tests):
        sys.exit("the tests fail without a mutant")
    out = []
    for number, m in enumerate(MUTANTS, 1):
        lived = passes(lambda number=number: become(number), tests)
        print(f"{'SURVIVED' if lived else 'killed':9} {m.header}: {m.what}", flush=True)
        if lived:
            out.append(m.what)
    return out
