"""`make gpu`: build, GPU tests, GPU benchmarks, with nothing but what is installed.

Needs torch with CUDA, nvcc, pybind11, ninja, setuptools, pytest, hypothesis, rich, typer, jinja2
and matplotlib, and no network. What matters most comes first. Every part has a time limit, and all
of them together $BUDGET seconds, else 570: what there is no time for is not begun. If a part fails,
that is written down and the next one runs. The log, all results and a summary go to the folder
named by $OUT, else to bench/results/gpu, after every part, and results of a benchmark after every
race; a short table comes last. STEPS=build,tests,... runs some parts only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
PYTHON = [sys.executable, "-m"]
RIVALS = "torch foreach,torch fused,torch fused with masters,eager in place,torch.compile"
RIVALS += ",Triton per parameter"
RIVALS += ",flashoptim,apex fused,TransformerEngine fused"  # where they are installed
MOMENTUM, ADAMW = "clip_sgd_momentum", "clip_adamw"
BUDGET = 570.0
LAST_WORDS = 8.0  # that a part has when it was told to end


class Part(NamedTuple):
    """A command, seconds that it may take, and fewer than which it is not begun with."""

    command: list[str]
    most: float
    least: float = 0.0
    environment: Mapping[str, str] = MappingProxyType({})


def _bench(models: str, methods: str, rivals: str = RIVALS, dtype: str = "fp32") -> list[str]:
    options = ["--device", "cuda", "--rounds", "12", "--dtype", dtype]
    chosen = ["--models", models, "--methods", methods, "--rivals", rivals]
    return [*PYTHON, "pysmooth.bench", *options, *chosen]


# Large models have a process each: memory is short. Small ones once more, every step as several
# launches where it is one.
PARTS: dict[str, Part] = {
    "build": Part(
        [*PYTHON, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."], 180
    ),
    "doctor": Part([*PYTHON, "pysmooth.doctor"], 20),
    "tests": Part(
        [*PYTHON, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"], 120, 20
    ),
    "small": Part(_bench("resnet20,resnet50,many-tiny", f"{MOMENTUM},{ADAMW}"), 75, 20),
    "gpt2": Part(_bench("gpt2-124m", f"{MOMENTUM},{ADAMW}"), 90, 25),
    "llama": Part(_bench("llama-3.2-1b", MOMENTUM, "torch fused,torch foreach"), 45, 20),
    "launches": Part(
        _bench("resnet20,many-tiny", f"{MOMENTUM},{ADAMW}", "torch fused"),
        *(40, 15),
        {"PYSMOOTH_CUDA_SINGLE": "0"},
    ),
    "top-k": Part(_bench("gpt2-124m", "ef_sgd-top-k,ef21-top-k", "eager in place"), 45, 20),
    "llama-adamw": Part(_bench("llama-3.2-1b", ADAMW, "torch fused"), 45, 20),
    "llama-bf16": Part(
        _bench("llama-3.2-1b", f"{MOMENTUM},{ADAMW}", "torch fused", "bf16"), 60, 20
    ),
    "gpt2-more": Part(
        _bench("gpt2-124m", "signum,clip_adagrad,ef_sgd-scaled-sign,clip_grad_norm (clipped)"),
        *(90, 25),
    ),
    "llama-8b": Part(_bench("llama-3-8b", MOMENTUM, "torch fused", "bf16"), 60, 25),
}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets it say what it has so far, then ends it and all that it has started."""
    process.send_signal(signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LAST_WORDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(name: str, part: Part, seconds: float, log: TextIO) -> str:
    """Runs one part from the checkout's root, its output kept, its end shown; says how it went."""
    print(f"== {name}: {' '.join(part.command)}", flush=True)
    defaults = {"PYSMOOTH_CUDA": "1", "PYSMOOTH_CUDA_ARCHS": "90"}
    environment = {**defaults, **os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    own = WORK / f"{name}.log"
    with own.open("w") as kept:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=kept,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            how = "ok" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"FAILED: not done after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                _end(process)
    text = own.read_text()
    log.write(f"== {name}: {' '.join(part.command)}\n{text}\n{how}\n\n")
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
    """Runs the parts; the exit code is 1 if one failed, or was not begun."""
    # Where this one was told to ignore it, so would its parts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = time.monotonic() + float(os.environ.get("BUDGET") or BUDGET)
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu").resolve()
    for folder in (out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    went: dict[str, str] = {}
    measured: dict[str, Any] = {}
    lines: list[str] = []
    summary: list[str] = []
    with (out / "log.txt").open("w") as log:
        for name in os.environ.get("STEPS", ",".join(PARTS)).split(","):
            part = PARTS[name]
            written = WORK / name / "results.json"
            measures = "pysmooth.bench" in part.command
            if measures:
                written.unlink(missing_ok=True)
                part = part._replace(command=[*part.command, "--out", str(written.parent)])
            left = ends - time.monotonic() - LAST_WORDS
            if left < part.least:
                went[name] = f"NOT BEGUN: {max(0.0, left):.0f} s left"
            else:
                went[name] = run(name, part, min(part.most, max(0.0, left)), log)
            if measures and written.is_file():
                measured[name] = json.loads(written.read_text())
                lines += [f"{name}:", *table(measured[name])]
                (out / "results.json").write_text(json.dumps(measured, indent=1) + "\n")
            summary = [*lines, *(f"{name:12} {how}" for name, how in went.items())]
            (out / "summary.txt").write_text("\n".join(summary) + "\n")
    print("\n" + "\n".join(summary))
    return int(any(how.startswith(("FAILED", "NOT BEGUN")) for how in went.values()))


if __name__ == "__main__":
    sys.exit(main())
