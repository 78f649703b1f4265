"""`make gpu`: build, GPU tests, GPU benchmarks, with nothing but what is installed.

Needs torch with CUDA, nvcc, pybind11, ninja, setuptools, pytest, hypothesis, rich, typer, jinja2
and matplotlib, and no network. Every part has a time limit; if one fails, that is written down and
the next one runs. The log, all results and a summary go to the folder named by $OUT, else to
bench/results/gpu; a short table comes last. STEPS=build,tests,... runs some parts only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
PYTHON = [sys.executable, "-m"]
RIVALS = "torch foreach,torch fused,torch fused with masters,eager in place,torch.compile"
RIVALS += ",Triton per parameter"
RIVALS += ",flashoptim,apex fused,TransformerEngine fused"  # where they are installed
USUAL = "clip_sgd_momentum,clip_adamw,signum,clip_grad_norm (clipped)"


def _bench(models: str, methods: str, rivals: str = RIVALS, dtype: str = "fp32") -> list[str]:
    options = ["--device", "cuda", "--rounds", "12", "--dtype", dtype]
    chosen = ["--models", models, "--methods", methods, "--rivals", rivals]
    return [*PYTHON, "pysmooth.bench", *options, *chosen]


# Command, and seconds that it may take. Large models have a process each: memory is short.
PARTS: dict[str, tuple[list[str], float]] = {
    "build": (
        [*PYTHON, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."],
        420,
    ),
    "doctor": ([*PYTHON, "pysmooth.doctor"], 60),
    "tests": ([*PYTHON, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"], 300),
    "small": (_bench("resnet50,many-tiny", USUAL), 150),
    "gpt2": (
        _bench("gpt2-124m", f"{USUAL},clip_adagrad,ef_sgd-scaled-sign,ef_sgd-top-k,ef21-top-k"),
        240,
    ),
    "llama": (_bench("llama-3.2-1b", "clip_sgd_momentum"), 120),
    "llama-adamw": (_bench("llama-3.2-1b", "clip_adamw", "torch fused"), 120),
    "llama-bf16": (
        _bench("llama-3.2-1b", "clip_sgd_momentum,clip_adamw", "torch fused", "bf16"),
        120,
    ),
    "llama-8b": (_bench("llama-3-8b", "clip_sgd_momentum", "torch fused", "bf16"), 150),
}


def run(name: str, command: list[str], seconds: float, log: TextIO) -> str:
    """Runs one part from the checkout's root, its output kept, its end shown; says how it went."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    defaults = {"PYSMOOTH_CUDA": "1", "PYSMOOTH_CUDA_ARCHS": "90"}
    environment = {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    own = WORK / f"{name}.log"
    with own.open("w") as kept:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=kept, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout=seconds)
            how = "ok" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            how = f"FAILED: not done after {seconds:.0f} s"
    text = own.read_text()
    log.write(f"== {name}: {' '.join(command)}\n{text}\n{how}\n\n")
    log.flush()
    print("\n".join(text.splitlines()[-25:]), flush=True)
    return f"{how}, {time.monotonic() - began:.0f} s"


def table(results: dict[str, Any]) -> list[str]:
    """A line per method and model: time, share of the copy bandwidth, rivals' times over ours."""
    copy = results["bandwidth"].get("copy")
    lines = []
    for row in results["rows"]:
        ours = row["contestants"][0]
        share = "-"
        # In 16 bits some streams are half as wide; small models are all launching.
        if copy and row["dtype"] == "fp32" and row["parameters"] >= 50_000_000:
            moved = 4.0 * row["streams"] * row["parameters"]
            share = f"{moved / ours['median_ms'] / 1e6 / copy:.2f}"
        others = ", ".join(f"{c['name']} {c['ratio']:.2f}" for c in row["contestants"][1:])
        lines.append(
            f"{row['model']:13} {row['method']:18} {row['dtype']:5} {row['backend']:6} "
            f"{ours['median_ms']:8.3f} ms  of copy {share}  x: {others}"
        )
    for host in results["host"]:
        count = host["tensors"]
        lines.append(
            f"{host['model']:13} host, {count} fresh gradients: "
            f"{host['pysmooth_us_per_tensor'] * count:.0f} us (torch fused + clip "
            f"{host['torch_us_per_tensor'] * count:.0f} us)"
        )
    return lines


def main() -> int:
    """Runs the parts; the exit code is 1 if one failed."""
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu").resolve()
    for folder in (out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    went: dict[str, str] = {}
    lines: list[str] = []
    measured: dict[str, Any] = {}
    with (out / "log.txt").open("w") as log:
        for name in os.environ.get("STEPS", ",".join(PARTS)).split(","):
            command, seconds = PARTS[name]
            written = WORK / name / "results.json"
            if "pysmooth.bench" in command:
                written.unlink(missing_ok=True)
                command = [*command, "--out", str(written.parent)]
            went[name] = run(name, command, seconds, log)
            if "pysmooth.bench" in command and written.is_file():
                measured[name] = json.loads(written.read_text())
                lines += table(measured[name])
                (out / "results.json").write_text(json.dumps(measured, indent=1) + "\n")
    lines += [f"{name:12} {how}" for name, how in went.items()]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return int(any("FAILED" in how for how in went.values()))


if __name__ == "__main__":
    sys.exit(main())
