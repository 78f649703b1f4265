"""FSDP2 with tensor parallelism, 2 x 2 processes: as the whole model in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_tp as cases
import sharded_tp_hooks as hooks
from sharded import run


@pytest.mark.interpreted
@pytest.mark.emulated
def test_steps_and_clips(tmp_path: Path) -> None:
    run(4, str(tmp_path / "store"), cases.optimizers, cases.rows, cases.clips)


@pytest.mark.emulated
def test_checkpoints(tmp_path: Path) -> None:
    """Saved on 2 x 2 processes; loaded there, and on 2 with FSDP2 alone."""
    args = (str(tmp_path),)
    run(4, str(tmp_path / "four"), cases.saved, cases.here, args=args)
    run(4, str(tmp_path / "whole"), cases.whole_states)
    run(2, str(tmp_path / "two"), cases.elsewhere, args=args)


def test_compressed_reductions(tmp_path: Path) -> None:
    run(4, str(tmp_path / "store"), hooks.reductions, hooks.resumed, hooks.void_steps)
