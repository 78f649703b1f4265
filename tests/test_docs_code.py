"""Runs the code in README.md and the pages of docs/: the blocks of a page one after the other.

docs/migration.md: test_migration.py.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pysmooth
import pysmooth.distributed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [p for p in PAGES if p.name != "migration.md" and "_build" not in p.parts]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
# What is not run: commands, and what Sphinx reads.
OTHERS = re.compile(r"sh|text|cpp|diff|\{\w+\}( \S+)?")


def blocks(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


class Net(torch.nn.Module):
    """A model with blocks, for pages that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_code_runs(page: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    names: dict[str, Any] = {
        "torch": torch,
        "pysmooth": pysmooth,
        "model": model,
        "params": list(model.parameters()),
        "optimizer": pysmooth.ClipSGD(model.parameters(), lr=0.1, max_norm=1.0),
        "x": torch.randn(16, 8),
    }
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_is_marked_as_such(page: Path) -> None:
    text = page.read_text()
    for language, _ in FENCE.findall(text):
        assert language == "python" or OTHERS.fullmatch(language), language
    if page.name not in ("README.md", "CONTRIBUTING.md"):
        plain = re.findall(r"^    .*(?:import |pysmooth\.\w+\().*$", FENCE.sub("", text), re.M)
        assert not plain, "Python that nothing runs"


def test_every_example_is_run_and_shown() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    page = (ROOT / "docs" / "examples.md").read_text()
    for example in ROOT.glob("examples/*.py"):
        assert re.search(rf"^(?:import|from) {example.stem}\b|\b{example.name}\b", tests, re.M) or (
            re.search(rf"^ +(?:import|from) {example.stem}\b", tests, re.M)
        ), f"{example.name} is not tested"
        assert f"../examples/{example.name}" in page


def test_streams_are_those_of_the_benchmark() -> None:
    from pysmooth.bench.methods import METHODS

    page = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (\(.*\)) \| (\d+) \|$", page, re.M)
    assert len(rows) > 10
    for name, passes, streams in rows:
        method = METHODS[name]
        assert passes == ", ".join(f"({w}, {r})" for w, r in method.passes), name
        assert int(streams) == method.streams, name


def test_the_decision_diagram_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "choosing.py"))
    assert (ROOT / "docs" / "choosing.svg").read_text() == script["picture"]()
    names = {word for _, _, lines in script["ROWS"] for word in re.findall(r"\w+", " ".join(lines))}
    optimizers = {
        name for name in names if re.search(r"SGD|GD$|Adam|EF\d|^Sign|Lion|Adagrad", name)
    }
    known = {*pysmooth.optim.__all__, *pysmooth.distributed.__all__}
    assert len(optimizers) > 10
    assert optimizers <= known


def test_links_lead_somewhere() -> None:
    """On GitHub, too: files beside docs/ and headings of other pages; Sphinx sees the rest."""
    for page in [*PAGES, ROOT / "docs" / "migration.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            path, _, heading = link.partition("#")
            if re.match(r"https?:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert heading in slugs, f"{page.name}: {link}"
