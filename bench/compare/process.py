"""A worker process of one revision, and how it is spoken to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

HERE = Path(__file__).resolve().parent


class WorkerError(Exception):
    """A worker that died, or imported another pysmooth than its own."""


class Worker:
    """`worker.py` with the pysmooth of a folder, maybe below another program."""

    def __init__(self, lib: Path, below: Sequence[str] = (), threads: int | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(lib), "PYTHONHASHSEED": "0"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        script = [str(HERE / "worker.py"), str(HERE.parent / "models.py")]
        self.process = subprocess.Popen(
            [*below, sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=lib,
        )
        try:
            where = Path(self._answer())
            if lib.resolve() not in where.resolve().parents:
                raise WorkerError(f"the worker of {lib} imported {where}")
        except BaseException:
            self.process.kill()
            self.close()
            raise

    def ask(self, command: str) -> str:
        """Sends a line; returns the line that comes back."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read() if self.process.stderr else ""
            raise WorkerError("\n".join(said.strip().splitlines()[-15:]) or "a worker died")
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, which ends with its input."""
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
