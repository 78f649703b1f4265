"""`make gpu`: build, GPU tests, GPU benchmarks, with nothing but what is installed.

Needs torch with CUDA, pybind11, ninja, pytest, rich, typer, matplotlib and jinja2, and no network.
Logs and results go to the folder named by $OUT, else to bench/results/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = "resnet50,many-tiny,gpt2-124m,llama-3.2-1b"


def stage(name: str, command: list[str], out: Path) -> int:
    """Runs one stage from the checkout's root, its output both shown and kept."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout or ():
            print(line, end="", flush=True)
            log.write(line)
        return process.wait()


def main() -> int:
    """Builds and tests; benchmarks even if a test failed, but the failure is the exit code."""
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = [sys.executable, "-m"]
    install = [*python, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    if stage("build", install, out):
        return 1
    failed = stage("tests", [*python, "pytest", "-m", "gpu", "-q", "tests"], out)
    bench = ["pysmooth.bench", "--device", "cuda", "--models", MODELS, "--out", str(out)]
    return stage("bench", [*python, *bench], out) or failed


if __name__ == "__main__":
    sys.exit(main())
