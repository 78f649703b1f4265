"""GradScaler where parameters are sharded: all processes step, or none does."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_amp as cases
from sharded import run


@pytest.mark.interpreted
@pytest.mark.emulated
def test_an_overflow_on_one_shard(tmp_path: Path) -> None:
    run(2, str(tmp_path / "store"), cases.overflows)


@pytest.mark.interpreted
@pytest.mark.emulated
def test_compressed_reductions(tmp_path: Path) -> None:
    run(2, str(tmp_path / "store"), cases.compressed_overflows, cases.overflows_elsewhere)


@pytest.mark.interpreted
@pytest.mark.emulated
def test_with_tensor_parallelism(tmp_path: Path) -> None:
    run(4, str(tmp_path / "store"), cases.tensor_parallel)
