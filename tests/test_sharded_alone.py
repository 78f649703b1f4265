"""Steps whose sums go through an exchange with no other process: those of steps without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from battery import (
    advance,
    assert_same_bits,
    assert_same_snapshot,
    make_params,
    record_grads,
    snapshot,
)
from test_ddp_alone import alone  # noqa: F401 - a fixture, for all tests

import pysmooth
from pysmooth import compressors
from pysmooth.distributed import set_sharding
from pysmooth.distributed.exchange import Exchange

Make = Callable[..., Any]


SKIP = {"nonfinite": "skip"}
METHODS: dict[str, Make] = {
    "clip": lambda p: pysmooth.ClipSGD(p, 0.1, momentum=0.9, max_norm=0.5, **SKIP),
    "clip by tensor": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.5, scope="tensor", **SKIP),
    "clip by group, largest": lambda p: pysmooth.ClipSGD(
        p, 0.1, max_norm=0.5, scope="group", norm_type=math.inf, **SKIP
    ),
    "agc": lambda p: pysmooth.ClipSGD(p, 0.1, clip="agc", **SKIP),
    "adam": lambda p: pysmooth.AdamW(p, 0.1, max_norm=0.5, **SKIP),
    "accumulated": lambda p: pysmooth.AdamNorm(p, 0.1, b_init=0.5, **SKIP),
    "top-k": lambda p: pysmooth.EFSGD(p, 0.1, compressors.TopK(ratio=0.1)),
    "top-k of a tensor": lambda p: pysmooth.EF21(p, 0.1, compressors.TopK(k=3)),
    "sign": lambda p: pysmooth.EFSGD(p, 0.1, compressors.ScaledSign(scope="global")),
    "clip21": lambda p: pysmooth.Clip21(p, 0.1, tau=0.5),
    "normalized": lambda p: pysmooth.NormalizedSGD(p, 0.1, scope="global", **SKIP),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_alone_it_is_the_step_without(make: Make) -> None:
    found = []
    rows = record_grads(make_params(), 4)
    rows[2][0].view(-1)[0] = math.nan
    for shared in (True, False):
        params = make_params()
        optimizer = make(params)
        if shared:
            set_sharding(optimizer, process_group=dist.group.WORLD, compress="global")
        advance(optimizer, params, rows)
        assert optimizer.resolved_backend == "cpu"
        assert optimizer.skipped_steps() == 1
        found.append((snapshot(optimizer), optimizer.last_norm(), optimizer.last_clip_coef()))
    assert_same_snapshot(found[0][0], found[1][0])
    for with_exchange, without in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(with_exchange, without, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("question", "make"),
    [
        ("tensors", METHODS["clip"]),
        ("units", METHODS["clip"]),
        ("digits", METHODS["top-k"]),
        ("before", METHODS["top-k"]),
    ],
)
def test_an_exchange_that_fails_ends_the_step(
    question: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its error, and parameters as they were; when coordinates are selected, the gradient is
    in the residual already."""
    params = make_params()
    optimizer = make(params)
    set_sharding(optimizer, process_group=dist.group.WORLD, compress="global")
    rows = record_grads(params, 3)
    advance(optimizer, params, rows[:1])
    before = snapshot(optimizer)

    def lost(*_: Any) -> Any:
        raise ConnectionError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(Exchange, question, lost)
        with pytest.raises(ConnectionError, match="connection lost"):
            advance(optimizer, params, rows[1:2])
    after = snapshot(optimizer)
    if question in ("digits", "before"):
        assert_same_bits(after[0], before[0])
    else:
        assert_same_snapshot(after, before)
    advance(optimizer, params, rows[2:])
    assert not optimizer.skipped_steps()
