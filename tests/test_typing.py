"""What type checkers see: stubs that are what the modules are, and a user's file under --strict."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pysmooth
from pysmooth import _cpu

PACKAGE = Path(pysmooth.__file__).parent
DUNDERS = {"__init__", "__call__"}


def named(function: ast.FunctionDef) -> list[str]:
    args = function.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def stubbed(stub: str) -> dict[str, list[str]]:
    """Functions, classes and methods ("Class.name") of a stub, with the names of arguments."""
    found: dict[str, list[str]] = {}
    for node in ast.parse((PACKAGE / stub).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = named(node)
        elif isinstance(node, ast.ClassDef) and "TypedDict" not in map(ast.unparse, node.bases):
            found[node.name] = []
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = named(inner)
    return found


def really(module: Any) -> dict[str, Any]:
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        found[name] = value
        if inspect.isclass(value):
            for inner, method in vars(value).items():
                if inner in DUNDERS or not inner.startswith("_"):
                    found[f"{name}.{inner}"] = method
    return found


def arguments(function: Any) -> list[str]:
    """Of pybind11's own first line: name(a: T, b: T = ..., /) -> R."""
    first = (function.__doc__ or "").strip().partition("\n")[0]
    inside = first.partition("(")[2].rpartition(") ->")[0]
    return re.findall(r"(?:^|, )(\w+):", inside)


def test_the_stub_is_the_module() -> None:
    stub, module = stubbed("_cpu.pyi"), really(_cpu)
    assert stub.keys() == module.keys()
    for name, names in stub.items():
        real = module[name]
        if inspect.isclass(real) or isinstance(real, property):
            continue
        told = arguments(real)
        if told and not any(re.fullmatch(r"arg\d+", n) for n in told):  # arguments without a name
            assert [n for n in names if n != "self"] == [n for n in told if n != "self"], name


def test_functions_without_names_take_as_many_arguments() -> None:
    for name, names in stubbed("_cpu.pyi").items():
        real = really(_cpu)[name]
        if not inspect.isclass(real) and not isinstance(real, property):
            told = arguments(real)
            assert not told or len(told) == len(names), name


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
