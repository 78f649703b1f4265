"""One mutant's tests, in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Loaded once, before the forks; pysmooth itself must not be.
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 600


def passes(prepare: Callable[[], None], tests: Sequence[str]) -> bool:
    """Whether the tests pass in a child in which `prepare` was called before pysmooth is imported.

    A mutant that ends the process, or never ends, fails them.
    """
    assert "pysmooth" not in sys.modules
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(SECONDS)
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                torch.set_num_threads(1)
                prepare()
                os.chdir(TESTS.parent)
                named = [
                    t if t.startswith("-") or "/" not in t else str(TESTS.parent / t) for t in tests
                ]
                code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *named]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0
