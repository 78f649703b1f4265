"""Tests of what a sceptic asks for: agreement, memory, scaling, and the page that shows them."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor

from . import agreement, memory, packages, rivals, scaling
from .methods import METHODS, make_problem
from .models import MODELS
from .numerics import Contestant
from .page import best_rivals, pieces, write_page
from .page.merge import merged
from .plots import figures
from .problem import Problem, Step, torch_step
from .suite import empty_results


def test_contestants_agree_and_who_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(problem: Problem) -> Step:
        optimizer = torch.optim.SGD(problem.params, lr=1.1 * problem.lr, momentum=0.9)
        return torch_step(problem, optimizer)

    monkeypatch.setattr(packages, "present", lambda name, device: name not in packages.PACKAGES)
    monkeypatch.setitem(METHODS["clip_sgd_momentum"].rivals, "another lr", other)
    rows = agreement.measure(["clip_sgd_momentum", "clip_grad_norm (clipped)"], "cpu", False, [])
    distances = {row["contestant"]: row["distance"] for row in rows}
    assert set(distances) == {"pysmooth", *rivals.RIVALS, "another lr"}
    assert distances.pop("another lr") > 1e-4
    assert max(distances.values()) < 1e-6


@pytest.mark.parametrize("name", ["clip_sgd_momentum", "clip_adamw", "clip_adam_norm"])
def test_the_compiled_step_starts_where_the_others_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = agreement.measure([name], "cpu", True, [])
    assert next(r["distance"] for r in rows if r["contestant"] == rivals.COMPILED) < 1e-6


def test_a_step_that_does_not_compile_is_left_out_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("buf7")

    monkeypatch.setattr(torch, "compile", fails)
    left_out: list[str] = []
    rows = agreement.measure(["clip_sgd_momentum"], "cpu", True, left_out)
    assert "pysmooth" in {row["contestant"] for row in rows}
    assert left_out == ["torch.compile on clip_sgd_momentum, agreement: KeyError: 'buf7'"]


def test_memory_is_counted_and_seen_from_outside() -> None:
    rows = memory.measure("clip_adamw", "resnet20", "cpu", ["torch fused"])
    assert [row["contestant"] for row in rows] == ["pysmooth", "torch fused"]
    for row in rows:
        # Two states of 4 bytes; pysmooth's arena is padded, torch has a step count per tensor.
        assert 8 <= row["state"] < 8.2
        assert row["peak"] == pytest.approx(row["kept"] + row["temporary"])


def test_only_what_the_compiler_does_not_hold_is_said_of_a_compiled_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    row = memory.alone("clip_adamw", rivals.COMPILED, "resnet20", "cpu")
    assert (row["kept"], row["peak"]) == (None, None)
    assert row["state"] == pytest.approx(8, rel=1e-3)


def test_a_contestant_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MODELS", {})
    monkeypatch.setitem(METHODS, "broken", METHODS["signum"])
    (row,) = memory.measure("broken", "resnet20", "cpu", [])
    assert row["error"] == "KeyError: 'broken'"


def test_bytes_of_shared_storages_count_once() -> None:
    arena = torch.zeros(100)
    assert memory._bytes_of([[arena[:50], arena[50:]], [torch.zeros(3)]]) == 412


def test_scaling_counts_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def watched(shapes: Any, *args: Any) -> Problem:
        seen.append([sum(s) for s in shapes])
        return make_problem(shapes, *args)

    monkeypatch.setattr(scaling, "make_problem", watched)
    monkeypatch.setattr(scaling, "COUNTS", (1, 30))
    monkeypatch.setitem(MODELS, "resnet50", MODELS["resnet20"])
    found = scaling.measure(["clip_sgd_momentum"], "cpu", 10_000, 0.02, lambda _: None)
    assert [p["x"] for p in found["parameters"]] == [1_000, 10_000]
    assert [sum(shapes) for shapes in seen[:2]] == [1_000, 10_000]
    assert all(len(shapes) == scaling.TENSORS for shapes in seen[:2])
    assert [p["x"] for p in found["tensors"]] == [1, 30]
    assert found["threads"][0]["x"] == 1
    for point in (p for series in found.values() for p in series):
        assert point["seconds"]["pysmooth"] > 0
        assert set(point["ratio"]) == set(point["seconds"]) - {"pysmooth"}


def test_rivals_go_before_pysmooth_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["clip_sgd_momentum"]
    for room, names in (
        (14.0, ["torch fused", "torch foreach"]),  # 2 + 3 states + 2 copies
        (8.0, ["torch fused"]),
        (4.5, []),
        (3.0, None),
    ):
        monkeypatch.setattr(scaling, "_available", lambda device, room=room: 4e6 * room)
        assert scaling._fitting(method, 10**6, "cpu") == names


def test_every_method_of_the_report_has_its_pieces() -> None:
    for model in ("resnet20", "many-tiny", "gpt2-124m"):
        raced: list[str] = []
        for name in pieces.NAMES:
            made = pieces.options(name, "cpu", 10**9, False)
            if made.parts == ("speed",) and made.models == [model]:
                raced += made.methods
        assert sorted(raced) == sorted(pieces.ALL)
    assert list(pieces.chosen("scaling, training", False)) == ["training", "scaling"]
    with pytest.raises(ValueError, match="'speed' is not one of: training"):
        pieces.chosen("speed", False)


def test_sizes_beyond_the_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_available", lambda device: 1e5)
    monkeypatch.setattr(scaling, "COUNTS", ())
    monkeypatch.setattr(scaling, "_threads", lambda cores: [])
    found = scaling.measure(["clip_sgd_momentum"], "cpu", 10**9, 0.02, lambda _: None)
    assert [p["x"] for p in found["parameters"]] == [1_000]


def test_flatness_is_that_of_large_sizes() -> None:
    points = [
        {"x": x, "method": "m", "seconds": {"pysmooth": s}}
        for x, s in ((10**3, 1.0), (10**7, 1.0), (10**8, 12.0))
    ]
    assert scaling.flatness({"parameters": points}) == {"m": pytest.approx(1.2)}


def test_who_has_no_room_at_the_largest_size_ends_before_it() -> None:
    both = {"pysmooth": 1.0, "torch foreach": 2.0}
    points = [
        {"x": 10**3, "method": "m", "seconds": both},
        {"x": 10**9, "method": "m", "seconds": {"pysmooth": 9.0}},
    ]
    results = {**empty_results("cpu"), "scaling": {"parameters": points}}
    (axis,) = figures(results)["scaling"].axes
    assert sorted(np.size(line.get_xdata()) for line in axis.lines) == [1, 2]


def row(model: str, ratio: float, backend: str = "cpu") -> dict[str, Any]:
    """A row of results, as the suite writes it."""
    names = (("pysmooth", 1.0), ("torch fused", ratio), ("<script>", 9.0))
    return {
        "method": "clip_sgd",
        "model": model,
        "dtype": "fp32",
        "backend": backend,
        "roofline_fraction": 0.9,
        "contestants": [
            {"name": n, "median_ms": r, "iqr_ms": 0.1, "ratio": r, "compile_s": None}
            for n, r in names
        ],
    }


def test_the_fastest_rival_is_named_and_eager_rows_claim_nothing() -> None:
    (found,) = best_rivals([row("a", 2.0), row("b", 3.0, "eager")])
    assert (found["model"], found["best"]["name"], found["best"]["ratio"]) == (
        "a",
        "torch fused",
        2,
    )


class Page(HTMLParser):
    """What a page asks for from elsewhere, and which elements it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.asked += [v for k in ("src", "href", "xlink:href") if (v := found.get(k))]
        if tag not in ("meta", "br", "img", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [v for k, v in attrs if k.endswith("href") and v]


def test_the_page_needs_nothing_beside_it_and_escapes_what_it_shows(tmp_path: Path) -> None:
    results = {**empty_results("cpu"), "rows": [row("a", 2.0), row("b", 0.5)]}
    results["agreement"] = [{"method": "m", "contestant": "c", "distance": 0.1}]
    results["memory"] = [
        {"method": "m", "model": "a", "contestant": "c", "error": "no room"},
        {"method": "m", "model": "a", "contestant": "d", "state": 4.0, "kept": None, "peak": None}
        | {"temporary": 0.5},
    ]
    results["scaling"] = {
        "parameters": [
            {"x": 10**7, "method": "m", "seconds": {"pysmooth": 1.0, "r": 2.0}, "ratio": {"r": 2.0}}
        ]
    }
    text = write_page(results, tmp_path).read_text()
    page = Page(text)
    assert page.open == []
    local = [a for a in page.asked if a.startswith("#")]
    (data,) = [a for a in page.asked if a.startswith("data:application/json")]
    assert len(local) + 1 == len(page.asked)
    assert json.loads(base64.b64decode(data.partition(",")[2])) == results
    assert "<script>" in text
    assert "&lt;script&gt;" in text
    assert text.count("<script>") == 1
    assert text.count('class="worse">0.50') == 2  # in short, and in its row
    assert "no room" in text
    # Every filter names a column.
    for names, heads in re.findall(r'data-filter="([^"]*)">(.*?)</thead>', text, re.S):
        columns = re.findall(r"<th[^>]*>([^<]*)</th>", heads)
        assert set(names.split(",")) <= set(columns)


def test_runs_are_merged_and_the_last_one_counts(tmp_path: Path) -> None:
    first = {"environment": {"cpu": "x", "torch": "1"}, "rows": [row("a", 1.0), row("b", 2.0)]}
    second = {"environment": {"cpu": "x", "torch": "2"}, "rows": [row("a", 3.0)], "left_out": ["y"]}
    files = []
    for i, results in enumerate((first, second)):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(results))
    found = merged(files)
    assert [(r["model"], r["contestants"][1]["ratio"], r["run"]) for r in found["rows"]] == [
        ("b", 2.0, "0"),
        ("a", 3.0, "1"),
    ]
    assert [run["name"] for run in found["runs"]] == ["0", "1"]
    assert found["environment"] == {"cpu": "x", "torch": "1; 2"}
    assert found["left_out"] == ["y"]
    # What was merged can be merged again, and figures keep their runs.
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(found))
    again = merged([whole])
    assert (again["rows"], again["runs"]) == (found["rows"], found["runs"])
    found["runs"][1] |= {"load": "3.15 1.00 0.50", "cores": "2"}
    text = write_page(found, tmp_path).read_text()
    assert "Measured in 0, 1 (" in text
    assert "Not alone on the machine: 1." in text
    files[0].write_text("{}")
    with pytest.raises(typer.BadParameter, match=r"0\.json"):
        merged(files)


def test_a_twin_takes_no_step_when_it_is_made() -> None:
    start: list[Tensor] = [torch.randn(10)]
    method = METHODS["clip_sgd_momentum"]
    side = Contestant(method.rivals["torch fused"], method, start, torch.float64)
    torch.testing.assert_close(side.values()[0], start[0].double())
