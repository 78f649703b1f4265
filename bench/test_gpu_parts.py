"""`make gpu` without a GPU: its parts, their limits, and what is kept when one is cut."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from . import gpu, suite
from .cli import execute
from .gpu import Part
from .suite import Options, run_suite

PYTHON = [sys.executable, "-c"]
TINY = {"methods": ["clip_sgd_momentum"], "models": ["many-tiny"], "rivals": ["torch fused"]}
SLEEPS = "import time; time.sleep(60)"


def options_of(**given: Any) -> Options:
    options = Options(**{**TINY, **given})
    options.end_to_end_seconds, options.rounds, options.seconds = 0.0, 1, 5.0
    return options


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "LAST_WORDS", 1.0)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.delenv("STEPS", raising=False)
    monkeypatch.delenv("BUDGET", raising=False)
    return tmp_path / "out"


def test_a_part_that_fails_or_hangs_is_written_down(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "fails": Part([*PYTHON, "print('why'); raise SystemExit(3)"], 30.0),
        "hangs": Part([*PYTHON, SLEEPS], 0.5),
        "works": Part([*PYTHON, "print('done')"], 30.0),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main() == 1
    summary = (out / "summary.txt").read_text()
    assert "FAILED with exit code 3" in summary
    assert "FAILED: not done after 0 s" in summary
    assert "ok, 0 s" in summary
    assert "why" in (out / "log.txt").read_text()
    assert capsys.readouterr().out.endswith(summary)


def test_what_there_is_no_time_for_is_not_begun(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts together end in time, and what was written by then is there."""
    parts = {
        "first": Part([*PYTHON, "print('done')"], 30.0),
        "long": Part([*PYTHON, SLEEPS], 30.0, 0.5),
        "late": Part([*PYTHON, "print('never')"], 30.0, 2.0),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setenv("BUDGET", "4")
    began = time.monotonic()
    assert gpu.main() == 1
    assert time.monotonic() - began < 6
    summary = (out / "summary.txt").read_text().splitlines()
    assert summary[0].startswith("first        ok")
    assert summary[1].startswith("long         FAILED: not done after")
    assert summary[2].startswith("late         NOT BEGUN")
    assert "never" not in (out / "log.txt").read_text()
    monkeypatch.setenv("STEPS", "first")
    assert gpu.main() == 0


def test_a_part_is_asked_before_it_is_killed_with_all_that_it_started(
    out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pytest says on an interrupt what failed so far; a compiler below a deaf part dies too."""
    alive = tmp_path / "alive"
    beats = f"while True: open({str(alive)!r}, 'w').write(str(time.time())); time.sleep(0.05)"
    child = f"import time\n{beats}"
    deaf = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    deaf += f"subprocess.run([sys.executable, '-c', {child!r}])"
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far: 7')"
    monkeypatch.setattr(
        gpu, "PARTS", {"polite": Part([*PYTHON, polite], 1.0), "deaf": Part([*PYTHON, deaf], 1.0)}
    )
    assert gpu.main() == 1
    assert "so far: 7" in (out / "log.txt").read_text()
    assert alive.exists()
    last = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == last


def test_a_benchmark_that_is_cut_leaves_its_races(
    out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every race is written down before the next one begins."""

    def measure(method: Any, model: str, *rest: Any) -> dict[str, Any]:
        if method.name != "clip_sgd_momentum":
            raise KeyboardInterrupt
        return {"method": method.name, "model": model}

    monkeypatch.setattr(suite, "measure", measure)
    methods = ["clip_sgd_momentum", "clip_adamw"]
    options = options_of(methods=methods, parts=("speed",), every_method=True)
    with pytest.raises(KeyboardInterrupt):
        execute(options, tmp_path / "written")
    (row,) = json.loads((tmp_path / "written" / "results.json").read_text())["rows"]
    assert row["method"] == "clip_sgd_momentum"

    folder = tmp_path / "work" / "cut"
    folder.mkdir(parents=True)
    results: dict[str, Any] = {"bandwidth": {}, "host": [], "rows": []}
    writes = f"open({str(folder / 'results.json')!r}, 'w').write({json.dumps(results)!r})"
    # The module's name makes a part one whose results are looked for.
    command = [*PYTHON, f"{writes}; {SLEEPS}", "pysmooth.bench"]
    monkeypatch.setattr(gpu, "PARTS", {"cut": Part(command, 1.0)})
    assert gpu.main() == 1
    assert json.loads((out / "results.json").read_text()) == {"cut": results}


def test_the_plan_fits_a_lent_machine() -> None:
    """Build, tests and the races that goals are about come first, and fit in their time."""
    names = list(gpu.PARTS)
    assert names[:3] == ["build", "doctor", "tests"]
    goals = names[: names.index("llama") + 1]
    most = sum(gpu.PARTS[name].most for name in goals)
    assert most + gpu.LAST_WORDS <= gpu.BUDGET <= 600
    assert all(0 <= part.least < part.most for part in gpu.PARTS.values())


def test_the_table() -> None:
    results = run_suite(options_of(), lambda _: None)
    (row,) = results["rows"]
    line, host = gpu.table(results)
    assert line.startswith("many-tiny     clip_sgd_momentum  fp32  cpu ")
    assert f"torch fused {row['contestants'][1]['ratio']:.2f}" in line
    assert "of copy -" in line
    assert "2000 fresh gradients" in host
    row["parameters"] = 10**9
    row["contestants"][0]["median_ms"] = 24.0  # 24 GB in 24 ms
    assert "of copy 0.50" in gpu.table({**results, "bandwidth": {"copy": 2000.0}})[0]
