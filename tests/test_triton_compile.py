"""The Triton kernels as compiled for a GPU, and whether the check of them sees what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pysmooth.engine.backends import triton_interpreted

pytest.importorskip("triton")
if triton_interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from pysmooth.triton_kernels import compile as aot
from pysmooth.triton_kernels.launch import Spec
from pysmooth.triton_kernels.rules import RULES
from pysmooth.triton_kernels.specs import Form, apply_spec

PLAIN = (torch.float32,) * 4


def adam(*, aligned: bool) -> Spec:
    spec = apply_spec(RULES["adam"], Form(PLAIN, aligned=aligned), zero=False)
    assert spec is not None
    return spec


ADAM = adam(aligned=True)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_adam_is_exact_and_in_whole_vectors(target: str) -> None:
    report = aot.compile_spec("adam", ADAM, target)
    assert aot.faults(report, ADAM) == []
    assert aot.vectors(report) > 0


@pytest.mark.parametrize("target", aot.TARGETS)
def test_codec(target: str) -> None:
    for name, spec in aot.messages.SPECS.items():
        report = aot.compile_spec(name, spec, target)
        assert report.spills == 0, name
        assert aot.faults(report, spec) == [], name


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_narrow_accesses_are_seen(target: str) -> None:
    unaligned = adam(aligned=False)
    report = aot.compile_spec("adam", unaligned, target)
    assert aot.faults(report, unaligned) == []
    assert any("accesses of 16 bytes" in fault for fault in aot.faults(report, ADAM))


def test_other_faults_are_seen() -> None:
    report = aot.compile_spec("adam", ADAM, "cuda:80")
    assert "div.rn.f32" in report.text
    rough = dataclasses.replace(report, text=report.text.replace("div.rn.f32", "div.full.f32"))
    assert aot.faults(rough, ADAM) == ["not exact: div.full.f32"]
    assert "64 bytes spilled" in aot.faults(dataclasses.replace(report, spills=64), ADAM)
    assert any("shared" in f for f in aot.faults(dataclasses.replace(report, shared=4096), ADAM))


def test_every_exact_kernel_is_compiled_for_every_rule() -> None:
    """What is compiled, and the types it is compiled for; not the compiling."""
    every = list(aot.specs(list(RULES)))
    assert set(aot.EXACT) <= {spec.kernel for _, spec in every}
    for name in RULES:
        assert any(label.startswith(f"{name} ") for label, _ in every), name
    for label, spec in every:
        types = aot.signature(spec)
        assert list(types) == list(spec.kernel.arg_names), label
        given = {name for name, kind in types.items() if kind == "constexpr"}
        assert given == dict(spec.constants).keys(), label


def test_the_command_names_faults_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = aot.compile_spec("adam", ADAM, "cuda:80")
    spilled = 0
    monkeypatch.setattr(aot, "specs", lambda rules: iter([(rules[0], ADAM)]))
    monkeypatch.setattr(aot, "compile_spec", lambda *_: dataclasses.replace(made, spills=spilled))
    monkeypatch.setattr("sys.argv", ["compile", "--targets", "cuda:80", "--rules", "adam"])
    assert aot.main() == 0
    assert "no complaints" in capsys.readouterr().out
    spilled = 17
    assert aot.main() == 1
    out = capsys.readouterr().out
    assert "17 bytes spilled" in out
    assert "1 kernels are not as they should be" in out
