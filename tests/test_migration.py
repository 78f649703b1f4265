"""Runs what docs/migration.md tells people to write, and what they had where torch runs that."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import pysmooth

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
BLOCKS = re.findall(r"```python (have|write)\n(.*?)```", PAGE.read_text(), re.DOTALL)
WRITE = [code for side, code in BLOCKS if side == "write"]
# What torch alone runs, with what is written instead.
PAIRS = [
    (have, write)
    for (side, have), (other, write) in pairwise(BLOCKS)
    if side == "have" and other == "write" and "import" not in have
]


def run(code: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    names: dict[str, Any] = {
        "torch": torch,
        "pysmooth": pysmooth,
        "model": model,
        "start": [p.detach().clone() for p in model.parameters()],
        "batches": [(10 * torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(6)],
        "loss": torch.nn.functional.cross_entropy,
    }
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_every_block_is_one_of_the_two() -> None:
    assert PAGE.read_text().count("```") == 2 * len(BLOCKS)
    assert len(PAIRS) == 5


@pytest.mark.parametrize("code", WRITE)
def test_what_to_write_trains(code: str) -> None:
    names = run(code)
    for p, q in zip(names["model"].parameters(), names["start"], strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, q)
    assert "pysmooth." in code


@pytest.mark.parametrize(("have", "write"), PAIRS)
def test_what_to_write_does_what_they_had(have: str, write: str) -> None:
    theirs, mine = run(have), run(write)
    for p, q in zip(mine["model"].parameters(), theirs["model"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    if "norm" in theirs:
        torch.testing.assert_close(mine["norm"], theirs["norm"])
