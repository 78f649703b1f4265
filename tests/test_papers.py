"""Papers' claims: every experiment runs, verdicts can be negative, figures and page are written."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pysmooth.bench.cli import app
from pysmooth.bench.papers import cli, registry
from pysmooth.bench.papers.outcome import Check, Config, Curve, Experiment, Outcome, Panel
from pysmooth.bench.papers.report import as_json, page
from pysmooth.bench.papers.runs import F64, Runs, Workers, descend, places
from typer.testing import CliRunner

from pysmooth import EFSGD, ClipSGD, TopK

EXPERIMENTS = registry.found()
# Claims that do not hold in the quick version; see docs/papers.md for those of the complete one.
# Levels in e3 are lower than expected; the weight in e6 needs more iterations; plain
# normalisation is not worse on that toy at all; Clip21-SGD minds the threshold little under
# symmetric noise; the sister paper's noise costs more than its budget.
KNOWN = {"e3": 1, "e6": 1, "dcsgd-normalised": 1, "clip21-logistic": 1, "clip21-digits": 1}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_version(name):
    experiment = EXPERIMENTS[name]
    assert experiment.papers
    assert experiment.setting
    outcome = experiment.run(Config(quick=True))
    assert outcome.panels
    assert outcome.checks
    result = as_json(experiment, Config(quick=True), outcome, 1.0)
    for panel in result["panels"]:
        for curve in panel["curves"]:
            assert all(len(row) == len(curve["x"]) for row in curve["quantiles"])
    failed = [check.line() for check in outcome.checks if not check.holds]
    assert len(failed) == KNOWN.get(name, 0), failed
    json.dumps(result, allow_nan=False)


def constant(value, *, why=""):
    def run(config):
        curve = Curve("a", [0.0, 1.0], torch.full((3, 2), value))
        check = Check.below("the value is below 1", value, 1.0, why=why)
        return Outcome([Panel("t", "x", "y", [curve])], [check])

    return Experiment("toy", "A constant", ("2505.20817",), "A constant.", run)


def test_side_by_side_as_one_by_one(tmp_path):
    """Processes of their own, and the same numbers."""
    found = {}
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        arguments = ["papers", "e4", "e5", "--quick", "--jobs", jobs, "--out", str(folder)]
        out = CliRunner().invoke(app, arguments)
        assert out.exit_code == 0, out.output
        assert "8 of 8 claims hold" in out.output
        found[jobs] = {
            name: json.loads((folder / name).read_text()) for name in ("e4.json", "e5.json")
        }
        for one in found[jobs].values():
            del one["seconds"]
    assert found["1"] == found["2"]


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.5, "holds"), (2.0, "does not hold"), (math.nan, "does not hold"), (1.0, "does not hold")],
)
def test_a_false_claim_is_reported(value, verdict, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "found", lambda: {"toy": constant(value, why="it is large")})
    docs = tmp_path / "docs"
    out = CliRunner().invoke(app, ["papers", "--out", str(tmp_path), "--docs", str(docs)])
    assert out.exit_code == 0, out.output
    assert f"expected < 1: {verdict}" in out.output
    assert ("it is large" in out.output) is (verdict != "holds")
    assert f"{int(verdict == 'holds')} of 1 claims hold" in out.output
    text = (docs / "papers.md").read_text()
    assert ("| **does not hold**: it is large |" in text) is (verdict != "holds")
    assert (docs / "papers" / "toy.png").stat().st_size > 1000
    assert json.loads((tmp_path / "toy.json").read_text())["checks"][0]["holds"] is (
        verdict == "holds"
    )


def test_other_checks():
    assert Check.near("c", 1.05, 1.0, 0.1).holds
    assert not Check.near("c", 1.2, 1.0, 0.1).holds
    assert not Check.near("c", math.nan, 1.0, 0.1).holds
    assert Check.above("c", 2.0, 1.0).holds
    assert not Check.above("c", 1.0, 1.0).holds


def test_a_quick_run_is_no_page(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "found", lambda: {"toy": constant(0.5)})
    out = CliRunner().invoke(app, ["papers", "--quick", "--docs", str(tmp_path)])
    assert out.exit_code == 2
    assert "0 of 0 claims hold" in page([])


@pytest.mark.parametrize(
    ("arguments", "word"), [(["nothing"], "none of"), (["--data", "/nowhere"], "no folder")]
)
def test_bad_arguments(arguments, word):
    out = CliRunner().invoke(app, ["papers", *arguments])
    assert out.exit_code == 2
    assert word in out.output


def test_names_are_listed():
    out = CliRunner().invoke(app, ["papers", "--list"])
    assert all(name in out.output for name in EXPERIMENTS)


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"pysmooth\[papers\]"):
        registry.need("pysmooth_no_such_package")


def test_files_without_experiment_or_with_a_taken_name(monkeypatch):
    with pytest.raises(ValueError, match="no EXPERIMENT"):
        registry._of(json)
    monkeypatch.setattr(registry, "_of", lambda module: constant(0.5))
    if len(EXPERIMENTS) > 1:
        with pytest.raises(ValueError, match="two experiments"):
            registry.found()


def test_runs_are_independent():
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=F64)
    runs = Runs(start)
    optimizer = ClipSGD(runs.params, 1.0, max_norm=1.0, clip_eps=0.0, scope="tensor")

    def step():
        runs.grad.copy_(runs.x)
        optimizer.step()

    curve = descend(Config(), step, lambda: runs.x.norm(dim=1), 3, "x")
    assert curve.x == [0.0, 1.0, 2.0, 3.0]
    torch.testing.assert_close(curve.values[0], torch.tensor([5.0, 4, 3, 2], dtype=F64))
    assert curve.values[1, 1:].abs().max() < 1e-12
    assert torch.equal(start[0], torch.tensor([3.0, 4.0], dtype=F64))


def test_workers_are_error_feedback_by_hand():
    generator = torch.Generator().manual_seed(0)
    runs = Runs(torch.zeros(3, 5, dtype=F64))
    workers = Workers(lambda ps: EFSGD(ps, 0.5, TopK(k=2)), 4, runs)
    residual = torch.zeros(4, 3, 5, dtype=F64)
    for _ in range(5):
        grads = torch.randn(4, 3, 5, generator=generator, dtype=F64)
        workers.grad.copy_(grads)
        v = residual + 0.5 * grads
        sent = torch.zeros_like(v)
        index = v.abs().topk(2, dim=2).indices
        sent.scatter_(2, index, v.gather(2, index))
        residual = v - sent
        torch.testing.assert_close(workers.mean(), sent.mean(0), rtol=1e-12, atol=1e-12)


def test_quantiles_count_what_is_not_finite_as_large():
    values = torch.tensor([[1.0], [2.0], [math.nan], [math.inf], [3.0]])
    low, middle, high = Curve("c", [0.0], values).quantiles()
    assert (low[0], middle[0], high[0]) == (1.0, 3.0, math.inf)


def test_places():
    assert places(3) == [0, 1, 2, 3]
    assert len(places(10**6)) < 180
    assert places(100, 10, log=False) == list(range(0, 101, 10))
