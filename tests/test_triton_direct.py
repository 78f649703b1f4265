"""Launches that go past Triton's launcher, above a driver that does nothing: it saw the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pysmooth.bench.launching import with_driver

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import torch, triton
from pysmooth.bench import launching
launching.use_driver()
import pysmooth
from pysmooth.triton_kernels.launch import Launch

params = [torch.nn.Parameter(torch.randn(n)) for n in (40, 7)]
optimizer = pysmooth.ClipSGD(params, 0.1, momentum=0.9, max_norm=1.0, backend="triton")
seen, told = [], []
call = Launch.__call__
def logged(launch, *given):
    before = launching.launches()
    call(launch, *given)
    seen.append([launching.launches() - before, *launching.last_launch()])
Launch.__call__ = logged

def step():
    for p in params:
        p.grad = torch.ones_like(p)
    del seen[:]
    optimizer.step()
    return list(seen)

def hook(metadata):
    told.append(metadata.get()["name"])

step()
plan = optimizer._engine._plan
launches = [x for part in plan._eager for x in part]
found = {"past": [x._direct is not None for x in launches], "first": step()}
found["again"] = step()
for x in launches:
    x._kept, x._direct = x._direct, None
found["through"] = step()
for x in launches:
    x._direct = x._kept
runtime = triton.knobs.runtime
runtime.launch_enter_hook.add(hook)
found["watched"] = step()
runtime.launch_enter_hook.remove(hook)
found["told"] = list(told)
step()
found["told later"] = len(told) - len(found["told"])
vars(sys.modules["pysmooth.triton_kernels.plan"])["current_stream"] = lambda _: 77
found["elsewhere"] = step()
print(json.dumps(found))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make the driver with")
def test_a_launch_past_the_launcher_is_the_launchers(tmp_path: Path) -> None:
    """As many launches, with the same grids, streams and arguments; profilers are still told."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env=with_driver(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["past"] == [True] * 3
    assert [row[0] for row in found["first"]] == [1] * 3
    assert all(row[1] > 0 and row[4] >= 32 and row[8] != 0 for row in found["first"])
    assert found["first"] == found["again"] == found["through"] == found["watched"]
    assert found["told"] == ["reduce", "finalize", "apply"]
    assert found["told later"] == 0
    moved = [[*row[:7], 77, *row[8:]] for row in found["first"]]
    assert found["elsewhere"] == moved
