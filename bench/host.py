"""Host cost per tensor, with gradients that a real backward has just made.

On a GPU: how long the host is busy until the step is enqueued, not until it is done.

Gradients whose Python wrappers already exist, in a warm cache, would flatter every figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import pysmooth

from .models import Shape
from .timing import interleave, ratio


def measure(shapes: list[Shape], device: str, rounds: int = 40) -> dict[str, Any]:
    """Seconds of clip + momentum SGD, pysmooth's and torch's fused one, and their ratio."""
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    inputs = [torch.randn(s, device=device) for s in shapes]

    def backward() -> None:
        for p in params:
            p.grad = None
        products = [p * x for p, x in zip(params, inputs, strict=True)]
        loss = torch.stack([x.sum() for x in products]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    backward()
    ours = pysmooth.ClipSGD(params, 1e-9, momentum=0.9, max_norm=1e9)
    fused = torch.optim.SGD(params, lr=1e-9, momentum=0.9, fused=True)

    def rival() -> None:
        clip_grad_norm_(params, 1e9)
        fused.step()

    contestants: dict[str, Callable[[], object]] = {"pysmooth": ours.step, "torch fused": rival}
    timed = interleave(contestants, rounds=rounds, prepare=backward, seconds=12)
    return {
        "backend": ours.resolved_backend,
        "seconds": {name: t.median for name, t in timed.items()},
        "ratio": {"torch fused": ratio(timed["torch fused"], timed["pysmooth"])},
    }


def per_tensor(model: str, shapes: list[Shape], device: str) -> dict[str, Any]:
    """The same of a model, in microseconds per tensor."""
    found = measure(shapes, device)
    count = len(shapes)
    return {
        "model": model,
        "tensors": count,
        "backend": found["backend"],
        "pysmooth_us_per_tensor": found["seconds"]["pysmooth"] / count * 1e6,
        "torch_us_per_tensor": found["seconds"]["torch fused"] / count * 1e6,
        "ratio": found["ratio"]["torch fused"],
    }
