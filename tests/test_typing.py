"""What type checkers see: stubs that are what the modules are, and a user's file under --strict."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import pysmooth

PACKAGE = Path(pysmooth.__file__).parent
DUNDERS = {"__init__", "__call__"}


def named(function: ast.FunctionDef) -> list[str]:
    args = function.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def stubbed(stub: str) -> dict[str, list[str]]:
    """Names of a stub and its classes ("Class.name"), with those of arguments."""
    found: dict[str, list[str]] = {}
    for node in ast.parse((PACKAGE / stub).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = named(node)
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = []
        elif isinstance(node, ast.ClassDef) and "TypedDict" not in map(ast.unparse, node.bases):
            found[node.name] = []
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = named(inner)
                elif isinstance(inner, ast.Assign):  # of an enumeration
                    found[f"{node.name}.{ast.unparse(inner.targets[0])}"] = []
    return found


def really(module: Any) -> dict[str, Any]:
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        found[name] = value
        if inspect.isclass(value):
            members = getattr(value, "__members__", None) or vars(value)
            for inner, method in members.items():
                if isinstance(method, types.WrapperDescriptorType):
                    continue  # the `__init__` of a class that only the module makes
                if inner in DUNDERS or not inner.startswith("_"):
                    found[f"{name}.{inner}"] = method
    return found


def arguments(function: Any) -> list[str]:
    """Of pybind11's own first line: name(a: T, b: T = ..., /) -> R."""
    first = (function.__doc__ or "").strip().partition("\n")[0]
    inside = first.partition("(")[2].rpartition(") ->")[0]
    return re.findall(r"(?:^|, )(\w+):", inside)


def native(name: str) -> Any:
    """The CUDA module is there where nvcc is, or in the emulation."""
    return pytest.importorskip(f"pysmooth.{name}", reason="the CUDA module was not built")


every_module = pytest.mark.parametrize(
    "name", ["_cpu", pytest.param("_cuda", marks=pytest.mark.emulated)]
)


@every_module
def test_the_stub_is_the_module(name: str) -> None:
    stub, module = stubbed(f"{name}.pyi"), really(native(name))
    assert stub.keys() == module.keys()
    for member, names in stub.items():
        real = module[member]
        if inspect.isclass(real) or isinstance(real, property) or not callable(real):
            continue
        told = arguments(real)
        assert len(told) == len(names), member
        if not any(re.fullmatch(r"arg\d+", n) for n in told):  # arguments without a name
            assert names == told, member


@every_module
def test_the_stub_knows_what_is_told_of_rules(name: str) -> None:
    body = ast.parse((PACKAGE / f"{name}.pyi").read_text()).body
    info = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == "RuleInfo")
    keys = {ast.unparse(n.target) for n in info.body if isinstance(n, ast.AnnAssign)}
    for rule in native(name).rules():
        assert rule.keys() == keys


USER = """
import torch
import pysmooth

model = torch.nn.Linear(3, 2)
optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
fused: torch.optim.Optimizer = pysmooth.swap(optimizer, max_norm=1.0)
clipped = pysmooth.ClipSGD(model.parameters(), lr=0.1, max_norm=1.0, master_weights=True)
norm: torch.Tensor = pysmooth.clip_grad_norm_(model.parameters(), 1.0)
last: torch.Tensor | None = clipped.last_norm()
loss: float = clipped.step(lambda: 1.0)
there = torch.cuda.is_available()
on_gpu = pysmooth.AdamW(model.parameters(), backend="cuda" if there else "eager")
portable = pysmooth.EFSGD(model.parameters(), 0.1, pysmooth.TopK(k=3), backend="triton")
"""


def test_a_users_file_is_clean_under_strict(tmp_path: Path) -> None:
    def mypy(code: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "user.py").write_text(code)
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "user.py"]
        command.append("--follow-imports=silent")  # as it does for what is installed
        env = {**os.environ, "MYPYPATH": str(PACKAGE.parent)}  # mypy sees no editable installation
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    good = mypy(USER)
    assert good.returncode == 0, good.stdout
    bad = mypy(USER + "pysmooth.ClipSGD(model.parameters(), clip='hrad')\nx: int = norm\n")
    assert bad.stdout.count("error:") == 2, bad.stdout


def test_one_version() -> None:
    root = Path(__file__).parents[1]
    project = (root / "pyproject.toml").read_text()
    assert 'version = { attr = "pysmooth.__version__" }' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)
    assert re.search(
        rf"^## {re.escape(pysmooth.__version__)}\b", (root / "CHANGELOG.md").read_text(), re.M
    )
