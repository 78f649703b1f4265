"""What a step of the Triton backend costs the host, on a machine without a GPU.

Triton's own launcher runs, above a driver (a libcuda.so.1 made here) that says yes to all and
does nothing, so this is Python and Triton without the driver's own time, on CPU tensors: on a GPU
the tables go to the device by an asynchronous copy, here by a plain one.

    python -m pysmooth.bench.launching
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pysmooth
from pysmooth.engine import backends

from .models import MODELS
from .timing import interleave, ratio

# Prototypes do not matter to a caller in C: every answer is 0, and what is written are numbers that
# Triton asks for before it launches anything.
_DRIVER = """
#include <stddef.h>
typedef unsigned long long u64;
#define YES(name) int name(void) { return 0; }
YES(cuInit) YES(cuCtxSetCurrent) YES(cuCtxSetLimit) YES(cuFuncSetAttribute)
YES(cuFuncSetCacheConfig) YES(cuModuleUnload) YES(cuDevicePrimaryCtxRelease)
YES(cuOccupancyMaxActiveClusters) YES(cuTensorMapEncodeTiled) YES(cuTensorMapEncodeIm2col)
static long launches;
long pysmooth_launches(void) { return launches; }
// Of the last launch: grid, threads, stream, the first two arguments.
static u64 last[9];
void pysmooth_last(u64* out) { for (int i = 0; i < 9; ++i) out[i] = last[i]; }
typedef struct { unsigned grid[3], block[3], shared; void* stream; } Config;
int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** more) {
  for (int i = 0; i < 3; ++i) last[i] = config->grid[i], last[3 + i] = config->block[i];
  last[6] = (u64)config->stream, last[7] = *(u64*)arguments[0], last[8] = *(u64*)arguments[1];
  ++launches;
  return 0;
}
int cuLaunchKernel(void) { ++launches; return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* device, int which) { *device = which; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)1; return 0; }
int cuCtxGetLimit(size_t* value, int what) { *value = 0; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)1; return 0; }
int cuModuleGetFunction(void** f, void* module, const char* name) { *f = (void*)1; return 0; }
int cuStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "error"; return 0; }
int cuPointerGetAttribute(void* out, int what, u64 address) { *(u64*)out = address; return 0; }
int cuFuncGetAttribute(int* value, int what, void* f) { *value = what == 0 ? 1024 : 0; return 0; }
int cuDeviceGetAttribute(int* value, int what, int device) {
  // Compute capability 9.0, 132 multiprocessors, warps of 32, 227 KiB of shared memory.
  *value = what == 75 ? 9 : what == 76 ? 0 : what == 16 ? 132 : what == 10 ? 32 : 232448;
  return 0;
}
"""
_HERE = "PYSMOOTH_STUB_DRIVER"  # the folder of the driver, in the process that loads it


def main() -> None:
    """Prints, and with --out writes, microseconds per step by model and contestant."""
    parser = argparse.ArgumentParser(prog="python -m pysmooth.bench.launching", description=__doc__)
    parser.add_argument("--models", default="resnet20,gpt2-124m,many-tiny")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    if _HERE not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(_beneath(Path(folder)))
    use_driver()
    found = [_measure(name, options.rounds) for name in options.models.split(",")]
    for row in found:
        times = ", ".join(f"{name} {us:.0f}" for name, us in row["microseconds"].items())
        print(f"{row['model']} ({row['tensors']} tensors): {times} us; launches {row['launches']}")
    if options.out:
        about = {"torch": torch.__version__, "triton": _triton().__version__}
        options.out.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")


def _beneath(folder: Path) -> int:
    """This command once more, where the driver is found: linkers look when a process starts."""
    command = [sys.executable, "-m", "pysmooth.bench.launching", *sys.argv[1:]]
    return subprocess.run(command, env=with_driver(folder), check=False).returncode


def with_driver(folder: Path) -> dict[str, str]:
    """Makes the driver in a folder; the environment of a process that finds it there."""
    (folder / "driver.c").write_text(_DRIVER)
    library = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-w"]
    command += [str(folder / "driver.c"), "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(command, check=True)
    # Kept apart: what is compiled for this driver is linked to it.
    places = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
    places |= {"TRITON_CACHE_DIR": folder / "cache", _HERE: folder}
    env = {**os.environ, **{key: str(place) for key, place in places.items()}}
    env.pop("TRITON_INTERPRET", None)
    return env


def _triton() -> Any:
    return importlib.import_module("triton")


def use_driver() -> None:
    """Triton compiles and launches for the driver; the backend takes CPU tensors for a device's."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    driver = object.__new__(nvidia.CudaDriver)
    driver.utils = nvidia.CudaUtils()
    driver.launcher_cls = nvidia.CudaLauncher
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda _: 0
    driver.set_current_device = lambda _: None
    driver.get_device_capability = lambda _: (9, 0)
    importlib.import_module("triton.runtime").driver.set_active(driver)
    vars(backends)["triton_interpreted"] = lambda: True
    engine: Any = importlib.import_module("pysmooth.engine.triton").TritonEngine
    engine.settled = lambda *_: None  # as on a GPU: nobody looks at what a step has done
    for name in ("plan", "words"):
        module = importlib.import_module(f"pysmooth.triton_kernels.{name}")
        vars(module)["current_stream"] = lambda _: 0


def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL(f"{os.environ[_HERE]}/libcuda.so.1")
    driver.pysmooth_launches.restype = ctypes.c_long
    return driver


def launches() -> int:
    """How many launches there were so far."""
    return int(_driver().pysmooth_launches())


def last_launch() -> list[int]:
    """Grid, threads, stream and the first two arguments of the last launch."""
    out = (ctypes.c_uint64 * 9)()
    _driver().pysmooth_last(out)
    return list(out)


def _measure(model: str, rounds: int) -> dict[str, Any]:
    # As many tensors as the model has. What the host does depends on their number, not their size.
    params = [torch.nn.Parameter(torch.randn(16)) for _ in MODELS[model]()]
    inputs = [torch.randn(16) for _ in params]

    def backward() -> None:
        for p in params:
            p.grad = None
        products = [p * x for p, x in zip(params, inputs, strict=True)]
        torch.stack([x.sum() for x in products]).sum().backward()  # type: ignore[no-untyped-call]

    momentum = pysmooth.ClipSGD(params, 1e-9, momentum=0.9, max_norm=1.0, backend="triton")
    adamw = pysmooth.AdamW(params, 1e-9, max_norm=1.0, backend="triton")
    contestants: dict[str, Callable[[], object]] = {
        "clip_sgd_momentum": momentum.step,
        "clip_adamw": adamw.step,
        "a launch per parameter": _per_parameter(params),
        **host_rivals(params),
    }
    counts = {}
    for name, step in contestants.items():
        for _ in range(3):
            backward()
            before = launches()
            step()
            counts[name] = launches() - before
    timed = interleave(contestants, rounds=rounds, prepare=backward, seconds=30)
    return {
        "model": model,
        "tensors": len(params),
        "launches": counts,
        "microseconds": {name: t.median * 1e6 for name, t in timed.items()},
        "ratio": ratio(timed["a launch per parameter"], timed["clip_sgd_momentum"]),
    }


def host_rivals(params: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    """What torch does on the host for the same tensors, on the CPU: computing is next to nothing.

    Its fused AdamW behind clip_grad_norm_; and what any step starts with, asking for gradients.
    """
    fused = torch.optim.AdamW(params, 1e-9, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        fused.step()

    return {"torch's clip, fused AdamW": step, "p.grad": lambda: [p.grad for p in params]}


def _per_parameter(params: list[torch.nn.Parameter]) -> Callable[[], object]:
    """Momentum SGD without a clip: the clip would be torch's, which runs on the CPU here."""
    kernels = importlib.import_module("pysmooth.bench.per_parameter")
    buffers = [torch.zeros_like(p) for p in params]

    def step() -> None:
        for p, buffer in zip(params, buffers, strict=True):
            launch = kernels._momentum[(1,)]
            launch(p, p.grad, buffer, p.numel(), 1e-9, 0.9, block=kernels.BLOCK)

    return step


if __name__ == "__main__":
    main()
