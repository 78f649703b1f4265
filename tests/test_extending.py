"""docs/extending, done as it says: a copy of the sources with one more method, built, examined."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "extending"
TREES = ("csrc", "pysmooth", "bench", "triton_kernels", "tests")
FILES = {
    "adamax.h": "csrc/core/math/adamax.h",
    "reference_adamax.py": "pysmooth/reference/adamax.py",
    "adamax.py": "pysmooth/optim/adamax.py",
}


def edit(copy: Path, block: str) -> None:
    """One diff block of the page: `--- path`, then lines of one place, kept, removed, added."""
    header, *lines = block.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -")
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    path = copy / header.removeprefix("--- ")
    text = path.read_text()
    assert text.count(before) == 1, f"{header}: {before!r} is there {text.count(before)} times"
    path.write_text(text.replace(before, after))


def test_the_worked_example_works(tmp_path: Path) -> None:
    leave = shutil.ignore_patterns("*.so", "__pycache__", "results", "build")
    for tree in TREES:
        shutil.copytree(ROOT / tree, tmp_path / tree, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name, place in FILES.items():
        assert not (tmp_path / place).exists(), "the library has it by now: take another method"
        shutil.copy(GUIDE / name, tmp_path / place)
    blocks = re.findall(r"^```diff\n(.*?)\n```$", (GUIDE / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 7
    for block in blocks:
        edit(tmp_path, block)

    def run(*command: str, **more: str) -> str:
        # The least that is compiled: bits do not depend on how far a compiler optimises.
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYSMOOTH_CUDA": "0", **more}
        env.pop("PYSMOOTH_ISA", None)
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    quick = {"PYSMOOTH_LEVELS": "baseline", "PYSMOOTH_CXXFLAGS": "-O0", "PYSMOOTH_WERROR": "1"}
    run("setup.py", "-q", "build_ext", "--inplace", **quick)
    battery = [str(path) for path in (tmp_path / "tests").glob("test_battery_*.py")]
    names = "adamax or test_published_rules"
    said = run("-m", "pytest", "-q", *battery, "tests/test_arithmetic.py", "-k", names)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) > 100
    place = run("-c", "from pysmooth import _cpu, optim; print(optim.Adamax, _cpu.__file__)")
    assert str(tmp_path) in place
