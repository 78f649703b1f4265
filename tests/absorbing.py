"""What the tests of EFSGD(absorb=True) share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backward import backward
from battery import all_params, assert_same_snapshot, make_params, record_grads, snapshot
from torch import Tensor

from pysmooth import EFSGD
from pysmooth.compressors import (
    QSGD,
    Compressor,
    HardThreshold,
    Identity,
    NaturalCompression,
    RandK,
    ScaledSign,
    TopK,
)

COMPRESSORS = [
    TopK(ratio=0.1),
    TopK(k=9, scope="global"),
    TopK(ratio=0.1, scope="block", block_size=64),
    RandK(ratio=0.1, scaled=False, seed=3),
    ScaledSign(),
    ScaledSign(scope="global"),
    HardThreshold(0.0123),
    Identity(),
    QSGD(levels=4, seed=1),
    NaturalCompression(seed=1),
]
# Of captured trainings: one parameter is empty.
SHAPES = ((5003,), (7, 5), (), (0, 4))
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


def pending(optimizer: EFSGD) -> list[int]:
    return [optimizer.state.get(p, {}).get("absorbed", 0) for p in all_params(optimizer)]


def without_count(snap: Any) -> Any:
    params, states = snap
    return params, [{k: v for k, v in s.items() if k != "absorbed"} for s in states]


def assert_same(absorbing: EFSGD, plain: EFSGD) -> None:
    """But for the count of absorbed gradients."""
    assert_same_snapshot(without_count(snapshot(absorbing)), snapshot(plain))


def compare(
    compressor: Compressor, backend: str, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> None:
    ours, expected = make_params(dtype=dtype), make_params(dtype=dtype)
    kwargs = {"lr": 0.1, "compressor": compressor, "backend": backend, **kwargs}
    optimizer, plain = EFSGD(ours, absorb=True, **kwargs), EFSGD(expected, **kwargs)
    for i, row in enumerate(record_grads(ours, 4)):
        part = [None if (i + k) % 5 == 0 else g for k, g in enumerate(row)]
        optimizer.zero_grad()
        plain.zero_grad()
        backward(ours, part)
        assert all(p.grad is None for p in ours)
        assert pending(optimizer) == [int(g is not None and g.numel() > 0) for g in part]
        backward(expected, part)
        optimizer.step()
        plain.step()
        assert not any(pending(optimizer))
        for o in (optimizer, plain):
            o.param_groups[0]["lr"] *= 0.5
    assert_same(optimizer, plain)
    assert not torch.equal(ours[4], make_params(dtype=dtype)[4])


class Training:
    """Parameters, their optimizer, and the memory that backward leaves gradients in."""

    def __init__(self, compressor: Compressor, backend: str, **kwargs: Any) -> None:
        self.params = make_params(SHAPES)
        kwargs = {"weight_decay": 0.1, "absorb": True, "backend": backend, **kwargs}
        self.optimizer = EFSGD(self.params, 0.1, compressor, **kwargs)
        self._memory = [torch.zeros_like(p) for p in self.params]

    def feed(self, row: list[Tensor]) -> None:
        for held, value in zip(self._memory, row, strict=True):
            held.copy_(value)

    def backward(self) -> None:
        """What the hooks do. The memory stays where it is, as in a graph."""
        for p, held in zip(self.params, self._memory, strict=True):
            p.grad = held
            self.optimizer.absorb_gradient(p)

    def train(self, *rows: list[Tensor]) -> None:
        for row in rows:
            self.feed(row)
            self.backward()
        self.optimizer.step()

    def counts(self) -> list[int]:
        saved = self.optimizer.state_dict()["state"]
        return [saved[i].get("absorbed", 0) for i in range(len(self.params))]
