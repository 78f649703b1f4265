"""Tests of the suite itself: a benchmark that miscounts is worse than none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from . import (
    aggregation,
    backward,
    bandwidth,
    end_to_end,
    numerics,
    packages,
    rivals,
    selection,
)
from .cli import app
from .methods import METHODS, make_problem
from .models import MODELS, numel
from .problem import Problem, Step
from .suite import Options, measure, run_suite
from .timing import Timed, interleave, ratio
from .training import convnet


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("resnet20", 269_722),
        ("resnet50", 25_557_032),
        ("bert-base", 109_482_240),
        ("gpt2-124m", 124_439_808),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3-8b", 8_030_261_248),
        ("many-tiny", 32_000),
    ],
)
def test_models_have_their_published_sizes(model: str, parameters: int) -> None:
    assert numel(MODELS[model]()) == parameters


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("clip_grad_norm (nothing clipped)", 1),
        ("clip_grad_norm (clipped)", 3),
        ("clip_sgd", 4),
        ("clip_sgd_momentum", 6),
        ("agc_sgd_momentum", 7),
        ("clip_adagrad", 6),
        ("clip_adamw", 8),
        ("clip_adamw-bf16-states", 6),
        ("clip_adam_norm", 6),
        ("signum", 5),
        ("l0l1_gd", 4),
        ("polyak_sgd", 4),
        ("adgd", 7),
        ("stm", 8),
        ("lion", 5),
        ("normalized_sgd", 6),
        ("ef_sgd-scaled-sign", 5),
        ("ef_sgd-top-k", 3),
        ("ef21-top-k", 4),
        ("clip21_sgd2m", 9),
    ],
)
def test_stream_budgets(method: str, streams: int) -> None:
    assert METHODS[method].streams == streams


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # A machine that slows down tenfold in one round does so for both sides of that round.
    ours, rival = Timed([1.0, 10.0, 1.0]), Timed([2.0, 20.0, 3.0])
    assert ratio(rival, ours) == 2.0


def test_interleave_times_every_contestant_once_per_round_and_rotates() -> None:
    order: list[str] = []
    ticks: Iterator[int] = iter(range(1000))
    timed = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=3,
        warmup=1,
        clock=lambda: float(next(ticks)),
    )
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timed["a"].seconds == [1.0, 1.0, 1.0]


def test_ulp_error_counts_units_of_the_last_place() -> None:
    before = torch.tensor([1.0], dtype=torch.float64)
    truth = torch.tensor([1.0], dtype=torch.float64)
    off = torch.tensor([1.0 + 3 * 2.0**-23], dtype=torch.float32)
    assert numerics.ulp_error(off, truth, before) == 3.0


def test_floor_adds_the_best_probe_of_every_pass() -> None:
    medians = {"floor 0rw+1r native": 1.0, "floor 0rw+1r torch": 2.0, "floor 2rw+1r torch": 5.0}
    assert bandwidth.floor_seconds(METHODS["clip_sgd_momentum"], medians) == 6.0


def test_probes_stream_without_changing_the_data_much() -> None:
    floor = bandwidth.Floor(10_000, "cpu")
    for method in METHODS.values():
        for run in floor.contestants(method).values():
            run()
    for tensor in floor.tensors:
        torch.testing.assert_close(tensor, torch.full((10_000,), 1e-3))


RIVALS = [
    (m.name, n)
    for m in METHODS.values()
    for n in m.rivals
    if "clip_grad_norm" not in m.name and packages.present(n, "cpu")
]


def same_step(of: str, name: str) -> bool:
    """Whether a rival does pysmooth's step, but for rounding."""
    package = packages.PACKAGES.get(name)
    return not METHODS[of].draws and (package is None or package.same_step)


def steps_of_both(of: str, name: str, shapes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Where three steps of pysmooth and of a rival lead, parameter by parameter."""
    method = METHODS[of]
    results = []
    for make in (lambda p: method.ours(p)[0], method.rivals[name]):
        problem = make_problem(shapes, method, "fp32", "cpu")
        problem.lr = 0.1
        step = make(problem)
        for _ in range(3):
            problem.restore()
            step()
        results.append([p.detach() for p in problem.params])
    return results


@pytest.mark.parametrize(("of", "name"), [r for r in RIVALS if METHODS[r[0]].draws])
def test_rivals_that_draw_do_the_same_step_on_average(of: str, name: str) -> None:
    torch.manual_seed(1)  # gradients are drawn from 0
    [ours], [theirs] = steps_of_both(of, name, [(200, 100)])
    start = make_problem([(200, 100)], METHODS[of], "fp32", "cpu").params[0].detach()
    difference = ours - theirs
    deviation = float(difference.std())
    assert deviation > 0
    assert abs(float(difference.mean())) < 4 * deviation / 20_000**0.5
    assert float((ours - start).std()) == pytest.approx(float((theirs - start).std()), rel=0.03)


@pytest.mark.parametrize(("of", "name"), [r for r in RIVALS if same_step(*r)])
def test_rivals_do_the_same_step_as_pysmooth(of: str, name: str) -> None:
    with warnings.catch_warnings():
        if name in packages.PACKAGES:  # what others do is theirs
            warnings.simplefilter("ignore")
        both = steps_of_both(of, name, [(33, 5), (7,)])
    for ours, theirs in zip(*both, strict=True):
        # A rounding to bfloat16 is off by less than 2^-7.
        rtol, atol = (2**-6, 2**-6 * 0.1) if "bf16" in of else (1e-5, 1e-6)
        if (of, name) == ("clip_adamw", "heavyball"):
            atol = 1e-5  # it divides by max(sqrt(v), eps) where others add eps
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_a_rival_that_cannot_run_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(problem: Problem) -> Step:
        raise packages.MissingError("DeepSpeedCPUAdagrad: no compiler")

    monkeypatch.setitem(METHODS["clip_adagrad"].rivals, packages.DEEPSPEED, missing)
    monkeypatch.setattr(packages, "present", lambda name, device: True)
    options = Options(
        methods=["clip_adagrad"],
        models=["many-tiny"],
        rivals=["torch fused", packages.DEEPSPEED],
        rounds=1,
        every_method=True,
    )
    left_out: list[str] = []
    row = measure(METHODS["clip_adagrad"], "many-tiny", options, lambda: 10.0, left_out)
    assert [c["name"] for c in row["contestants"]] == ["pysmooth", "torch fused"]
    assert left_out == ["DeepSpeedCPUAdagrad: no compiler"]


def test_handwritten_step_is_the_same_step() -> None:
    method = METHODS["clip_sgd_momentum"]
    ours = make_problem([(33, 5), (7,)], method, "fp32", "cpu")
    ours.lr = 0.1
    theirs = make_problem([(33, 5), (7,)], method, "fp32", "cpu")
    step, _ = method.ours(ours)
    step()
    params = [p.detach() for p in theirs.params]
    grads = [p.grad for p in theirs.params if p.grad is not None]
    rivals.handwritten(params, grads, [p * 0 for p in params], 0.1, 0.9, theirs.max_norm)
    for a, b in zip(ours.params, params, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)


def test_clipping_methods_clip_in_every_round() -> None:
    problem = make_problem([(100,)], METHODS["clip_grad_norm (clipped)"], "fp32", "cpu")
    step, _ = METHODS["clip_grad_norm (clipped)"].ours(problem)
    for _ in range(3):
        problem.restore()
        before = problem.params[0].grad
        assert before is not None
        before = before.clone()
        step()
        torch.testing.assert_close(problem.params[0].grad, 0.5 * before)


def test_second_looks_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (300, 100)
    rows = [[torch.randn(shape, generator=generator)] for _ in range(5)]
    usual = selection.look("normal", rows)
    assert (usual["selections"], usual["second_looks"]) == (5, 0)
    signs = [[torch.sign(g[0]).repeat(30, 30)] for g in rows]
    assert int(str(selection.look("all of one size", signs)["second_looks"])) > 0
    names = [name for name, _ in selection.adversarial()]
    assert len(names) == len(set(names)) > 5


def test_methods_that_draw_have_no_numerics() -> None:
    drawing = [name for name in METHODS if METHODS[name].draws]
    assert drawing
    assert numerics.compare(drawing, steps=(1,)) == []


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].draws])
def test_numerics_of_pysmooth_are_no_worse_than_float32_allows(name: str) -> None:
    first, last = numerics.compare([name], steps=(1, 20))
    assert (first["method"], first["steps"], last["steps"]) == (name, 1, 20)
    # The rival is the same method: both stay near the same float64 run.
    bound = {"bf16": 0.1, "fp32": 1e-5}["bf16" if "bf16" in name else "fp32"]
    for side in ("pysmooth", "rival"):
        assert last[f"{side}_relative_error"] < bound
        if METHODS[name].rounds_states:
            assert last[f"{side}_max_ulp"] is None
        else:
            assert first[f"{side}_max_ulp"] <= last[f"{side}_max_ulp"] < 64
    assert last["pysmooth_relative_error"] > 0 or "nothing clipped" in name


def test_training_learns_and_both_curves_agree() -> None:
    result = end_to_end.run(convnet(), seconds=0.5)
    losses = result["losses_pysmooth"]
    assert isinstance(losses, list)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    # The first steps are the same but for rounding; later ones may drift apart.
    theirs = result["losses_torch"]
    assert isinstance(theirs, list)
    assert max(abs(a - b) for a, b in zip(losses[:10], theirs[:10], strict=True)) < 1e-3


def test_a_small_run_writes_the_whole_report(tmp_path: Path) -> None:
    from rich.console import Console

    from .page import write_page
    from .plots import write_plots
    from .report import print_report, write_json

    options = Options(models=["resnet20"], rivals=["torch fused"], rounds=1)
    options.end_to_end_seconds, options.seconds = 0.2, 5.0
    results = run_suite(options, lambda _: None)
    print_report(results, Console(quiet=True))
    plots = write_plots(results, tmp_path)
    page = write_page(results, tmp_path)
    data = json.loads(write_json(results, tmp_path).read_text())
    assert {p.name for p in plots} == {"speedups.png", "numerics.png", "losses.png"}
    assert page.read_text().count("<svg") == len(plots)
    usual = [m.name for m in METHODS.values() if m.models is None or "resnet20" in m.models]
    assert [row["method"] for row in data["rows"]] == usual
    for row in data["rows"]:
        assert row["backend"] in ("cpu", "eager")
        assert all(math.isfinite(c["ratio"]) for c in row["contestants"])
    assert data["environment"]["torch"] == torch.__version__


def test_cost_of_a_clip_in_backward() -> None:
    layer = torch.nn.Linear(40, 30)

    def loss() -> torch.Tensor:
        out: torch.Tensor = layer(torch.ones(2, 40))
        return out.square().sum()

    found = backward.measure(list(layer.parameters()), loss, rounds=3)
    for f in found.values():
        assert f["backward_ms"] > 0
        assert f["step_ms"] > 0
    assert found[backward.PLAIN]["cost_ms"] == 0
    lines = backward.describe(found)
    assert len(lines) == 3
    assert all(name in line for name, line in zip(found, lines, strict=True))


@pytest.mark.parametrize("clients", [1, 2, 7, 10])
def test_sums_over_clients_do_the_same_work(clients: int) -> None:
    sums = aggregation.Sums(clients, 70_001)
    wide = torch.stack(sums.vectors).double()
    exact = (wide * torch.tensor(sums.weights).double().unsqueeze(1)).sum(0)
    runs = sums.runs()
    assert runs.keys() <= aggregation.moved(clients, 1).keys()
    for name, run in runs.items():
        sums.out.fill_(float("nan"))
        if name == aggregation.FLOOR:
            sums.out.zero_()
            assert run() == 0.0
            continue
        assert run() == pytest.approx(float(exact.norm()), rel=1e-6)
        torch.testing.assert_close(sums.out.double(), exact, rtol=1e-5, atol=1e-5)


def test_sums_over_clients_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "sums.json"
    arguments = ["aggregate", "--sizes", "4x5000,3x100", "--rounds", "3", "--out", str(file)]
    out = CliRunner().invoke(app, arguments)
    assert out.exit_code == 0, out.output
    first, second = json.loads(file.read_text())
    assert (first["clients"], first["size"], second["clients"]) == (4, 5000, 3)
    assert first["rows"]["pysmooth"]["ratio"] == 1.0
    assert first["rows"]["pysmooth"]["bytes"] == 6 * 20_000
    assert all(row["seconds"] > 0 for row in first["rows"].values())
    assert CliRunner().invoke(app, ["aggregate", "--sizes", "4x"]).exit_code == 2


PER_PARAMETER = """
import torch
from pysmooth.bench import per_parameter
from pysmooth.bench.problem import Problem, torch_step

for rule, make in (
    ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
):
    runs = []
    for ours in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (1, 1000, 3000)]
        problem = Problem(params, 0.1, 0.9, 1.0)
        step = per_parameter.STEPS[rule](problem) if ours else torch_step(problem, make(params))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
print("same")
"""


def test_triton_with_a_launch_for_every_parameter_takes_torchs_steps() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    said = subprocess.run(
        [sys.executable, "-c", PER_PARAMETER], env=environment, capture_output=True, text=True
    )
    assert said.stdout == "same\n", said.stderr
