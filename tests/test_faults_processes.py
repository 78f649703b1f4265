"""Ends of the interpreter, and processes that take over."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    make_params,
    record_grads,
)

import pysmooth

SHAPES = ((5, 3), (), (0, 2), (33,))


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


SETUP = """
import torch, pysmooth
torch.manual_seed(0)
model = torch.nn.Linear(300, 200)
TopK = pysmooth.compressors.TopK
optimizers = [
    pysmooth.Adam(model.parameters(), max_norm=1.0, norm="in_backward"),
    pysmooth.EFSGD(model.parameters(), 0.1, TopK(ratio=0.1)),
    pysmooth.ClipSGD(model.parameters(), 0.1, momentum=0.9, max_norm=1.0),
]
def steps():
    for optimizer in optimizers:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(8, 300)).square().sum().backward()
            optimizer.step()
"""


@pytest.mark.parametrize("end", ["", "import sys; sys.exit()", "optimizers.append(optimizers)"])
def test_interpreter_ends_with_live_optimizers(end: str) -> None:
    """Also in reference cycles, and with hooks on parameters."""
    run(SETUP + "steps()\n" + end)


def test_spawned_process_goes_on_with_the_same_bits(tmp_path: Any) -> None:
    params = make_params(SHAPES)
    rows = record_grads(params, 4)
    optimizer = pysmooth.Adam(params, lr=0.1, max_norm=1.0)
    advance(optimizer, params, rows[:2])
    file = tmp_path / "handed"
    torch.save((optimizer, rows[2:]), file)
    run(
        f"import torch\noptimizer, rows = torch.load({str(file)!r}, weights_only=False)\n"
        "params = optimizer.param_groups[0]['params']\n"
        "for row in rows:\n"
        "    for p, g in zip(params, row): p.grad = g.to(p.dtype)\n"
        "    optimizer.step()\n"
        f"torch.save([p.detach() for p in params], {str(file)!r})"
    )
    advance(optimizer, params, rows[2:])
    assert_same_bits(params, torch.load(file))
