"""Tests of the comparison of revisions; counting under valgrind takes a minute: marked slow."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from . import cli
from .compare import build, instructions, times
from .compare.cli import verdict
from .compare.process import Worker, WorkerError
from .compare.worker import CASES

ROOT = Path(__file__).resolve().parents[1]


def test_a_worker_steps_every_case() -> None:
    with Worker(ROOT) as worker:
        for case in CASES:
            assert worker.ask(f"open {case}") == "ok"
            assert float(worker.ask("run 2")) > 0
            assert worker.ask("close") == "ok"


def shim(lib: Path, code: str) -> Path:
    """A folder with a pysmooth that is this one, and then some code."""
    (lib / "pysmooth").mkdir(parents=True)
    text = f"""
import pathlib
__path__.append({str(ROOT / "pysmooth")!r})
exec(pathlib.Path(__path__[-1], "__init__.py").read_text())
"""
    (lib / "pysmooth" / "__init__.py").write_text(text + code)
    return lib


def test_what_a_revision_lacks_is_missing(tmp_path: Path) -> None:
    older = shim(tmp_path / "older", "del EF21\n")
    cases = ["EF21, top-k", "Signum"]
    found = times.measure(older, ROOT, cases, 4, lambda _: None)
    assert "EF21" in found["EF21, top-k"]["missing"]
    assert found["Signum"]["low"] <= found["Signum"]["ratio"] <= found["Signum"]["high"]


def test_a_worker_that_imports_another_pysmooth_or_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="imported"):
        Worker(tmp_path)
    with pytest.raises(WorkerError, match="no such thing"):
        Worker(shim(tmp_path / "dead", "raise SystemExit('no such thing')\n"))


def test_ratios_are_head_over_base_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, lib: Path) -> None:
            self.seconds = 0.01 if lib.name == "base" else 0.03
            self.machine = 1.0

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, command: str) -> str:
            if not command.startswith("run"):
                return "ok"
            self.machine *= 1.5  # a machine that slows down does so for both
            return str(self.seconds * self.machine)

    monkeypatch.setattr(times, "Worker", Fake)
    found = times.measure(Path("base"), Path("head"), ["Signum"], 8, lambda _: None)
    # The base has answered once before, to learn how many steps fit a turn.
    assert found["Signum"]["ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("time", "count", "said"),
    [
        ({"missing": "x"}, None, "only one of them has it"),
        ({"ratio": 2.0, "low": 1.5, "high": 3.0}, 1.0001, "the same"),
        ({"ratio": 1.0, "low": 0.9, "high": 1.1}, 1.02, "slower"),
        ({"ratio": 1.0, "low": 0.9, "high": 1.1}, 0.9, "faster"),
        ({"ratio": 1.1, "low": 1.05, "high": 1.2}, None, "slower"),
        ({"ratio": 1.1, "low": 0.9, "high": 1.2}, None, "the same, or too noisy to tell"),
        ({"ratio": 0.8, "low": 0.7, "high": 0.9}, None, "faster"),
    ],
)
def test_verdicts(time: dict[str, float], count: float | None, said: str) -> None:
    assert verdict(time, count) == said


def test_unknown_revisions_and_cases_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    assert "none of" in run(cli.app, ["compare", "HEAD", "--cases", "ClipSDG"]).output
    monkeypatch.setattr(build, "ROOT", Path("/"))
    result = run(cli.app, ["compare", "HEAD"])
    assert (result.exit_code, "no checkout" in result.output) == (2, True)


def test_a_revision_is_taken_from_git_and_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "WORK", tmp_path / "build" / "compare")
    # A build that says how often it ran.
    setup = """
import pathlib
p = pathlib.Path("lib")
p.mkdir(exist_ok=True)
with (p / "x").open("a") as file:
    file.write("1")
"""
    (tmp_path / "setup.py").write_text(setup)
    (tmp_path / ".gitignore").write_text("build\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "setup.py").write_text(setup + "\n(p / 'edited').touch()")
    for _ in range(2):
        name, lib = build.built("HEAD")
        assert (len(name), (lib / "x").read_text(), (lib / "edited").exists()) == (12, "1", False)
    _, lib = build.built(build.WORKING)
    assert (lib / "edited").exists()
    with pytest.raises(build.BuildError, match="nowhere"):
        build.built("nowhere")


@pytest.mark.slow
def test_instructions_are_the_same_from_run_to_run_and_see_a_second_step(tmp_path: Path) -> None:
    if not instructions.available():
        pytest.skip("valgrind is not installed")
    twice = """
step = ClipSGD.step
ClipSGD.step = lambda self, closure=None: (step(self), step(self))
"""
    libs = [ROOT, ROOT, shim(tmp_path / "twice", twice)]
    counts = [instructions.measure(x, ["ClipSGD", "Signum"], lambda _: None) for x in libs]
    assert counts[1]["ClipSGD"] == pytest.approx(counts[0]["ClipSGD"], rel=0.01)
    assert counts[2]["ClipSGD"] == pytest.approx(2 * counts[0]["ClipSGD"], rel=0.05)
    assert counts[2]["Signum"] == pytest.approx(counts[0]["Signum"], rel=0.01)
