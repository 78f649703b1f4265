"""What pysmooth.doctor() tells."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pysmooth
from pysmooth import _doctor
from pysmooth._extras import needs
from pysmooth.engine import backends


def test_it_tells_versions_backends_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    pysmooth.doctor()
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert f"{torch.get_num_threads()} threads" in said
    assert pysmooth.engine.probe.isa() in said
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    for info in backends.REGISTERED:
        reason = info.missing()
        assert ("does not run" in lines[info.name]) == (reason is not None)
        assert reason is None or reason in lines[info.name]


def test_cpu_device_gets_what_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    pysmooth.doctor()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["cpu"]][1:]
    assert line.split()[1] == backends.fastest([torch.zeros(1)])


def test_a_missing_module_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_load_native", lambda: "no libgomp here")
    pysmooth.doctor()
    said = capsys.readouterr().out
    assert "does not run: no libgomp here. Reinstall pysmooth" in said


def test_as_a_program_and_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-W", "error", "-m", "pysmooth.doctor"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("pysmooth")
    assert said.stderr == ""
    function = pysmooth.doctor
    try:
        module = importlib.import_module("pysmooth.doctor")
        assert module is sys.modules["pysmooth.doctor"]
        pysmooth.doctor()  # the module by now
        assert capsys.readouterr().out == said.stdout
    finally:
        pysmooth.doctor = function


def test_packages_that_are_not_there_and_gpus_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _doctor._version("no-such-package") == "not installed"
    assert _doctor._version("torch") == importlib.metadata.version("torch")
    for hip, cuda, said in [
        (None, None, "no GPU support"),
        (None, "12.9", "CUDA 12.9"),
        ("7.0", None, "ROCm 7.0"),
    ]:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert _doctor._toolkit() == f" ({said})"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    assert _doctor._devices()[1:] == [("cuda:0", "card 0"), ("cuda:1", "card 1")]


def test_a_module_that_lacks_something_itself_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        needs("half_installed", extra="bench")
    with pytest.raises(ImportError, match=r"needs what_it_needs.*pysmooth\[bench\]"):
        needs("what_it_needs.inside", extra="bench")
