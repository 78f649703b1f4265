"""Uses an installed pysmooth, from a directory that is no checkout.

smoke.py [FOLDER]: the folder is where torch lies, if it is not installed beside pysmooth.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

# Behind the environment's own site-packages, so that the wheel is what is imported.
sys.path += sys.argv[1:2]

import pysmooth.bench
import pysmooth.triton_kernels
import torch

import pysmooth

where = Path(pysmooth.__file__).resolve().parent
assert Path(sys.prefix).resolve() in where.parents, where
told = importlib.metadata.version("pysmooth")
assert told.partition("+")[0] == pysmooth.__version__, told
for name in ("py.typed", "_cpu.pyi", "_cuda.pyi", "THIRD_PARTY_LICENSES"):
    assert (where / name).is_file(), name
notices = (where / "THIRD_PARTY_LICENSES").read_text()
assert "Redistributions in binary form" in notices, "pybind11's licence"
assert "Apache License" in notices, "that of DLPack's header"


def train(optimizer: torch.optim.Optimizer, model: torch.nn.Module, clip: float | None) -> None:
    """Five steps, with torch's clip before each if there is one."""
    for _ in range(5):
        optimizer.zero_grad()
        (10 * model(torch.ones(4, 8))).square().sum().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
twin = torch.nn.Linear(8, 8)
twin.load_state_dict(model.state_dict())
for name, theirs in (("ClipSGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
    kwargs = {"lr": 0.1, "momentum": 0.9} if name == "ClipSGD" else {"lr": 0.1}
    optimizer = getattr(pysmooth, name)(model.parameters(), max_norm=1.0, **kwargs)
    train(optimizer, model, None)
    train(theirs(twin.parameters(), **kwargs), twin, 1.0)
    assert optimizer.resolved_backend == "cpu"
pysmooth.engine.native_module()  # or the reason why it does not load
for a, b in zip(model.parameters(), twin.parameters(), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # of two trainings, not of one step

# Without torch's C functions, as where a torch does not have them.
code = "import torch; from pysmooth import _cpu; print(_cpu.uses_direct(), _cpu.uses_dlpack())"
code = f"import sys; sys.path += {sys.argv[1:2]}; {code}"
env = {**os.environ, "PYSMOOTH_DIRECT": "0"}
said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
assert said.stdout.split()[:1] == ["False"], said


def libraries() -> list[str]:
    """What this process has loaded."""
    if sys.platform == "linux":
        return Path("/proc/self/maps").read_text().split()
    dyld = ctypes.CDLL(None)
    dyld._dyld_get_image_name.restype = ctypes.c_char_p
    return [dyld._dyld_get_image_name(i).decode() for i in range(dyld._dyld_image_count())]


# Two OpenMP runtimes would be two pools of threads: torch's is the only one.
names = ("libgomp", "libomp", "libiomp")
runtimes = sorted({p for p in libraries() if Path(p).name.startswith(names)})
assert len(runtimes) == 1, runtimes
print("OpenMP:", *runtimes)
print(f"smoke test: ok, pysmooth {told}, torch {torch.__version__},", where)
