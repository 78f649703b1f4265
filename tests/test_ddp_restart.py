"""A rank is killed in the middle of a step; the job starts again, and ends with the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch


def test_a_killed_rank_costs_no_bit(tmp_path: Path) -> None:
    path = Path(__file__).parent / "ddp_restart.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "--max-restarts", "1", str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        # Else gloo finds the addresses of the first life in torchrun's store.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert done.returncode == 0, done.stderr
    survivor = torch.load(tmp_path / "survivor.pt")
    assert re.search("^[^U].*(closed|reset) by peer", survivor["error"]), survivor["error"]
    assert survivor["staged"], "it died before anything was sent"
    assert survivor["unchanged"] == [True, True]
    assert survivor["after step"]
    for rank in range(2):
        found = torch.load(tmp_path / f"done{rank}.pt")
        assert found["from"] == 4
        assert any("estimate" in name for name in found["names"])
        assert any(name.startswith("momentum") for name in found["names"])
        assert found["same"] == [True, True]
