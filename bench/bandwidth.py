"""The machine's bandwidth for each mix of streams, from the best of several kernels.

A read-only pass may stream slower or faster than one that also writes, so a method's floor is the
sum of the best measured time of each of its passes, not bytes over one bandwidth figure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pysmooth.engine import available_backends, probe

from .methods import Method, Pass


class Floor:
    """Probes of every mix that some methods need, at one size."""

    def __init__(self, numel: int, device: str) -> None:
        self.numel = numel
        self.native = device == "cpu" and "cpu" in available_backends()
        self.tensors = [torch.full((numel,), 1e-3, device=device) for _ in range(4)]

    def probes(self, mix: Pass) -> dict[str, Callable[[], object]]:
        """Kernels with exactly these streams: the native probe's and torch's own."""
        rw, r = mix
        a, b, c, _ = self.tensors
        label = f"floor {rw}rw+{r}r"
        found: dict[str, Callable[[], object]] = {}
        if self.native:
            writes, reads = self.tensors[:rw], self.tensors[rw : rw + r]
            found[f"{label} native"] = lambda: probe.mix(writes, reads)
        torch_kernels: dict[Pass, Callable[[], object]] = {
            (0, 1): lambda: torch.linalg.vector_norm(a),
            (1, 0): lambda: a.mul_(1.0),
            (1, 1): lambda: a.add_(b, alpha=1e-30),
            (2, 1): lambda: _fused_sgd(a, b, c),
        }
        if mix in torch_kernels:
            found[f"{label} torch"] = torch_kernels[mix]
        return found

    def contestants(self, method: Method) -> dict[str, Callable[[], object]]:
        """All probes for the method's passes, to be timed along with the method itself."""
        return {name: run for mix in method.passes for name, run in self.probes(mix).items()}


def _fused_sgd(param: Tensor, grad: Tensor, buffer: Tensor) -> None:
    torch._fused_sgd_(
        [param],
        [grad],
        [buffer],
        weight_decay=0.0,
        momentum=1.0,
        lr=1e-30,
        dampening=1.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def floor_seconds(method: Method, medians: dict[str, float]) -> float:
    """The sum over the passes of the best probe's median."""
    total = 0.0
    for rw, r in method.passes:
        total += min(s for name, s in medians.items() if name.startswith(f"floor {rw}rw+{r}r "))
    return total


def mix_names() -> dict[str, Pass]:
    """The mixes reported as the machine's bandwidth."""
    return {"read": (0, 1), "read-modify-write": (1, 0), "read + read-modify-write": (1, 1)}


def copy_probes(floor: Floor) -> dict[str, Callable[[], object]]:
    """Kernels that copy one tensor to another."""
    a, b, *_ = floor.tensors
    found: dict[str, Callable[[], object]] = {"copy torch": lambda: a.copy_(b)}
    if floor.native:
        found["copy native"] = lambda: probe.copy(a, b)
    return found
