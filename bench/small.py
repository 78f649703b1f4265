"""Where the time of a step goes on a small model: `python -m pysmooth.bench.small`.

In the same rounds, with gradients that a backward has just made: the step; the same on as many
tensors of one element (what tensors cost); the same on a single element (what a call costs); and
the step's streams over one tensor of the model's size (what its memory traffic costs, wherever in
the caches it lies). A step that asked nothing of torch and did nothing but stream would take the
last one's time: the rivals' time over it is a bound that no program of these passes can exceed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import rivals
from .bandwidth import Floor, floor_seconds
from .methods import METHODS, Method, make_problem
from .models import MODELS, Shape, numel
from .timing import interleave, ratio


def measure(
    method: Method, model: str, rounds: int, seconds: float, compiled: bool = False
) -> dict[str, Any]:
    """Microseconds of every contestant, and the rivals' times over the step's and the floor's."""
    shapes = MODELS[model]()
    prepared: list[Callable[[], None]] = []
    sizes: dict[str, list[Shape]] = {
        "step": shapes,
        "tensors of one element": [(1,)] * len(shapes),
        "one element": [(1,)],
    }
    contestants: dict[str, Callable[[], object]] = {}
    for name, given in sizes.items():
        problem = make_problem(given, method, "fp32", "cpu")
        prepared.append(_backward(problem.params))
        prepared[-1]()
        contestants[name], _ = method.ours(problem)
        if name == "step":
            for rival in ("torch for-loop", "torch foreach", "torch fused"):
                if rival in method.rivals:
                    contestants[rival] = method.rivals[rival](problem)
            if compiled and method.compiled is not None:
                contestants[rivals.COMPILED], _ = method.compiled(problem)
    contestants |= Floor(numel(shapes), "cpu").contestants(method)

    def prepare() -> None:
        for backward in prepared:
            backward()

    timed = interleave(contestants, rounds=rounds, prepare=prepare, seconds=seconds)
    medians = {name: t.median for name, t in timed.items()}
    floor = floor_seconds(method, medians)
    others = [name for name in contestants if name in rivals.NAMES]
    return {
        "model": model,
        "method": method.name,
        "tensors": len(shapes),
        "parameters": numel(shapes),
        "microseconds": {name: s * 1e6 for name, s in medians.items()},
        "floor": floor * 1e6,
        "ratio": {name: ratio(timed[name], timed["step"]) for name in others},
        "bound": {name: medians[name] / floor for name in others},
    }


def _backward(params: list[torch.Tensor]) -> Callable[[], None]:
    factors = [torch.randn_like(p) for p in params]

    def run() -> None:
        for p in params:
            p.grad = None
        products = [(p * x).sum() for p, x in zip(params, factors, strict=True)]
        torch.stack(products).sum().backward()  # type: ignore[no-untyped-call]

    return run


def main() -> None:
    """Prints, and with --out writes, a row per model and method."""
    parser = argparse.ArgumentParser(prog="python -m pysmooth.bench.small", description=__doc__)
    parser.add_argument("--models", default="resnet20,many-tiny")
    parser.add_argument("--methods", default="clip_sgd,clip_sgd_momentum,clip_adamw")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=40.0, help="at most, for each row")
    parser.add_argument("--compile", action="store_true", help="the compiled step as well")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    rows = []
    for model in options.models.split(","):
        for name in options.methods.split(","):
            method = METHODS[name]
            row = measure(method, model, options.rounds, options.seconds, options.compile)
            rows.append(row)
            print(f"{name}, {model}: {row['tensors']} tensors, {row['parameters']} parameters")
            for label, us in row["microseconds"].items():
                print(f"  {label:26} {us:9.1f} us")
            print(f"  {'floor':26} {row['floor']:9.1f} us")
            for label, x in row["ratio"].items():
                print(f"  {label:26} {x:9.2f} x the step, {row['bound'][label]:.2f} x the floor")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
