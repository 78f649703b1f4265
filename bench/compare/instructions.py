"""Instructions of a step, counted by callgrind: the same from run to run, on any machine.

Counting is on only while steps are taken, so that importing torch costs half a minute and not ten.
One thread: valgrind runs threads by turns, and how long they wait for one another would be counted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .process import Worker, WorkerError

STEPS = 20


def available() -> bool:
    """Whether valgrind is there, with the program that turns counting on and off."""
    return all(shutil.which(name) for name in ("valgrind", "callgrind_control"))


def measure(lib: Path, cases: list[str], say: Callable[[str], None]) -> dict[str, float]:
    """Instructions of one step, by case; cases that the revision lacks are left out."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        below = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
        with Worker(lib, [*below, f"--callgrind-out-file={out}"], threads=1) as worker:
            for case in cases:
                say(f"instructions: {case}")
                if worker.ask(f"open {case}") != "ok":
                    continue
                # What is counted first also has code that valgrind sees for the first time.
                for _ in range(2):
                    _control(worker, "-z")
                    _control(worker, "-i", "on")
                    worker.ask(f"run {STEPS}")
                    _control(worker, "-i", "off")
                    _control(worker, "--dump=steps")
                found[case] = _total(out) / STEPS
                worker.ask("close")
    return found


def _control(worker: Worker, *command: str) -> None:
    pid = str(worker.process.pid)
    done = subprocess.run(["callgrind_control", *command, pid], capture_output=True, text=True)
    if done.returncode != 0 or "OK." not in done.stdout:
        raise WorkerError(f"callgrind_control {' '.join(command)}: {done.stdout + done.stderr}")


def _total(out: Path) -> float:
    """The total of the last dump: callgrind numbers its files."""
    dumps = sorted(out.parent.glob(f"{out.name}.*"), key=lambda p: int(p.suffix[1:]))
    total = re.search(r"^totals: (\d+)", dumps[-1].read_text(), re.MULTILINE)
    if total is None or int(total[1]) == 0:
        raise WorkerError(f"callgrind counted nothing in {dumps[-1].name}")
    return float(total[1])
