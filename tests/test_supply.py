"""What pysmooth brings in: no network, no unpickling, dependencies as they were locked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "requirements-dev.lock"
# Python's own modules that open connections, or run what data tell them to.
CONNECT = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "socketserver",
    "xmlrpc",
    "requests",
}
UNPICKLE = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}
FILES = sorted([*(ROOT / "pysmooth").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def test_nothing_connects_or_unpickles() -> None:
    assert len(FILES) > 100
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not set(imported(tree)) & (CONNECT | UNPICKLE), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                # Flower's workers keep their state in bytes: tensors and numbers.
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_import_and_step_open_no_connection() -> None:
    """Python tells its audit hooks of every socket."""
    code = (
        "import sys, torch\n"
        "sys.addaudithook(lambda event, _: event.startswith('socket.') and sys.exit(event))\n"
        "import pysmooth\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "optimizer = pysmooth.Adam([p], max_norm=1.0); optimizer.step()\n"
        "optimizer.load_state_dict(optimizer.state_dict()); optimizer.step()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("group", ["dev", "docs"])
def test_lock_has_the_pins_of_the_groups(group: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(rf"^{group} = \[(.*?)\]$", text, re.S | re.M)
    assert listed is not None
    pins = re.findall(r'"([\w.-]+)==([\w.]+)', listed.group(1))
    assert pins
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", LOCK.read_text(), re.M)
    )
    for name, version in pins:
        assert locked[re.sub(r"[-_.]+", "-", name).lower()] == version
