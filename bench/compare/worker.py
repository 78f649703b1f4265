"""Steps of one revision, on demand: a script that sees only that revision's pysmooth.

Started as `worker.py MODELS`, the path of bench/models.py, so that both revisions have the same
shapes. Reads lines and answers each with one: "open NAME" makes a case and warms it up ("ok", or
"missing: why" in a revision that does not have it), "run N" takes N steps (the seconds), "close".
Nothing here may need what older revisions lack, but for the cases themselves.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import pysmooth

Step = Callable[[], object]
WARMUP = 5

# By name: the model, and how its step is made of parameters.
CASES: dict[str, tuple[str, Callable[[Any], Step]]] = {
    "clip_grad_norm_": ("resnet20", lambda p: lambda: pysmooth.clip_grad_norm_(p, 1.0)),
    "ClipSGD": ("resnet20", lambda p: pysmooth.ClipSGD(p, 1e-9, max_norm=1.0).step),
    "ClipSGD, momentum": (
        "resnet20",
        lambda p: pysmooth.ClipSGD(p, 1e-9, momentum=0.9, max_norm=1.0).step,
    ),
    "ClipSGD, momentum, many tensors": (
        "many-tiny",
        lambda p: pysmooth.ClipSGD(p, 1e-9, momentum=0.9, max_norm=1.0).step,
    ),
    "AdamW": ("resnet20", lambda p: pysmooth.AdamW(p, 1e-9, max_norm=1.0).step),
    "Adagrad": ("resnet20", lambda p: pysmooth.Adagrad(p, 1e-9).step),
    "Signum": ("resnet20", lambda p: pysmooth.Signum(p, 1e-9).step),
    "EFSGD, top-k": (
        "resnet20",
        lambda p: pysmooth.EFSGD(p, 1e-9, pysmooth.TopK(ratio=0.01)).step,
    ),
    "EF21, top-k": ("resnet20", lambda p: pysmooth.EF21(p, 1e-9, pysmooth.TopK(ratio=0.01)).step),
    "Clip21SGD2M": ("resnet20", lambda p: pysmooth.Clip21SGD2M(p, 1e-9, 1.0).step),
}


def make(name: str, models: dict[str, Any]) -> Step:
    """The step of a case, warm."""
    model, of = CASES[name]
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in models[model]()
    ]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    step = of(params)
    for _ in range(WARMUP):
        step()
    return step


def main() -> None:
    """Answers until its input ends."""
    models = runpy.run_path(sys.argv[1])["MODELS"]
    step: Step | None = None
    print(pysmooth.__file__, flush=True)
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        answer = "ok"
        if command == "open":
            try:
                step = make(rest, models)
            except (AttributeError, TypeError) as error:
                answer = f"missing: {error}"
        elif command == "run" and step is not None:
            start = time.perf_counter()
            for _ in range(int(rest)):
                step()
            answer = repr(time.perf_counter() - start)
        else:
            step = None
        print(answer, flush=True)


if __name__ == "__main__":
    main()
