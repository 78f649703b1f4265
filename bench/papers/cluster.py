"""The workers of a data-parallel method in one process: what its hook encodes and decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from pysmooth.distributed.method import Context, Method, Slot


class Cluster:
    """N ranks that average gradients by a method of `pysmooth.distributed`.

    Messages are made and read as the hook does it; nothing travels. Gradients are float32.

    Args:
        method: one of `pysmooth.distributed`, in one phase and without states.
        ranks: N.
    """

    def __init__(self, method: Method, ranks: int) -> None:
        if method.two_phase or method.joint:
            raise ValueError(f"{method!r} has two phases, or looks at everything at once")
        self.method, self.ranks, self._step = method, ranks, 0
        self._slots: dict[int, Slot] = {}

    def mean(self, grads: Tensor) -> Tensor:
        """(S, d) of gradients (N, S, d): every row of S is a tensor of its own."""
        _, s, d = grads.shape
        out = torch.empty(s, d)
        messages = torch.zeros(self.ranks, self.method.size(d, self.ranks), dtype=torch.uint8)
        contexts = [Context(rank, self.ranks, self._step) for rank in range(self.ranks)]
        for row in range(s):
            slot = self._slots.setdefault(row, Slot("", row, d, out.device))
            for context, grad, message in zip(contexts, grads[:, row], messages, strict=True):
                self.method.encode(context, slot, grad, message)
            if slot.touched:
                raise ValueError(f"{self.method!r} has states")
            self.method.decode(contexts[0], slot, messages, out[row])
        self._step += 1
        return out
