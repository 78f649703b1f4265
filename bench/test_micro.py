"""Micro-benchmarks: `pytest bench --benchmark-autosave`, later `--benchmark-compare`."""

from __future__ import annotations

from typing import Any

import pytest

from .methods import METHODS, make_problem
from .models import MODELS


@pytest.mark.parametrize("model", ["resnet20", "many-tiny", "resnet50"])
@pytest.mark.parametrize("method", list(METHODS))
def test_step(benchmark: Any, method: str, model: str) -> None:
    problem = make_problem(MODELS[model](), METHODS[method], "fp32", "cpu")
    step, backend = METHODS[method].ours(problem)
    benchmark.extra_info["backend"] = backend
    benchmark(step)
