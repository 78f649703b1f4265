"""EFSGD(absorb=True) on the CUDA backend: what is launched, captures, and what the host is told."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from absorbing import Training
from battery import CUDA_EMULATED, assert_same_bits, record_grads
from cuda_late import Capture, NoReads, on_a_late_device  # noqa: F401 - a fixture
from simt import emulated
from torch.nn import Parameter

import pysmooth

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not CUDA_EMULATED, reason="PYSMOOTH_EMULATED=1 is not set"),
]


COMPRESSORS = (
    pysmooth.TopK(ratio=0.05),
    pysmooth.ScaledSign(),
    pysmooth.QSGD(4, scope="block", block_size=64, seed=1),
)
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


@pytest.mark.usefixtures("late")
@every_compressor
def test_a_gradient_is_two_launches_and_nothing_waits(compressor: Any) -> None:
    ours = Training(compressor, "cuda")
    for i, row in enumerate(record_grads(ours.params, 3)):
        ours.feed(row)
        before = emulated.calls()
        with NoReads() if i else nullcontext():
            ours.backward()
        launched = emulated.calls().launches - before.launches
        assert launched == 2 * 3  # an empty parameter has none
        with NoReads() if i else nullcontext():
            ours.optimizer.step()
        assert emulated.calls().uploads == before.uploads + (i == 0)


@pytest.mark.usefixtures("late")
@every_compressor
def test_replays_and_other_steps(compressor: Any) -> None:
    """Against the same training without a graph; one gradient of a replay is not finite."""
    ours, theirs = Training(compressor, "cuda"), Training(compressor, "cuda")
    rows = record_grads(ours.params, 6)
    rows[4][0][7] = float("nan")
    ours.train(rows[0])
    with Capture() as graph:
        ours.backward()
        ours.optimizer.step()
    for i, row in enumerate(rows[1:]):
        if i % 2:
            ours.feed(row)
            graph.replay()
        else:  # a step beside the graph, with a learning rate of its own
            ours.optimizer.param_groups[0]["lr"] = 0.03
            ours.train(row)
    for i, row in enumerate(rows):
        theirs.optimizer.param_groups[0]["lr"] = 0.03 if i % 2 else 0.1
        theirs.train(row)
    assert_same_bits(ours.params, theirs.params)
    assert ours.optimizer.skipped_steps() == theirs.optimizer.skipped_steps() == 1


@pytest.mark.usefixtures("late")
def test_a_captured_backward_alone() -> None:
    """The device counts what replays take in: weight decay comes once, and the host can ask."""
    ours, theirs = (Training(pysmooth.TopK(k=9), "cuda") for _ in range(2))
    rows = record_grads(ours.params, 4)
    for one in (ours, theirs):
        one.train(rows[0])
    with Capture() as graph:
        ours.backward()
    assert ours.counts() == [0, 0, 0, 0]
    for row in rows[1:]:
        ours.feed(row)
        graph.replay()
    assert ours.counts() == [3, 3, 3, 0]
    with pytest.raises(RuntimeError, match="zero_grad"):
        ours.optimizer.zero_grad()
    ours.optimizer.step()
    theirs.train(*rows[1:])
    assert_same_bits(ours.params, theirs.params)
    assert ours.counts() == [0, 0, 0, 0]


@pytest.mark.usefixtures("late")
def test_the_first_gradient_is_not_captured() -> None:
    ours = Training(pysmooth.ScaledSign(), "cuda")
    ours.feed(record_grads(ours.params, 1)[0])
    with Capture(), pytest.raises(pysmooth.BackendError, match="same step once before"):
        ours.backward()
    assert not ours.optimizer.state


@pytest.mark.usefixtures("late")
def test_raise_comes_when_the_host_asks() -> None:
    ours = Training(pysmooth.TopK(k=9), "cuda", nonfinite="raise")
    first, second = record_grads(ours.params, 2)
    ours.train(first)
    second[1][0, 0] = float("inf")
    ours.train(second)
    with pytest.raises(pysmooth.NonFiniteGradientError, match=r"'group 0, parameter 1'$"):
        ours.optimizer.state_dict()
    assert ours.counts() == [0, 0, 0, 0]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_on_the_device(dtype: torch.dtype) -> None:
    """Nobody waits to know it, and a replay finds what is there by then."""
    ours, theirs = (Training(pysmooth.ScaledSign(), "cuda") for _ in range(2))
    lr = torch.tensor(0.1, dtype=dtype)
    ours.optimizer.param_groups[0]["lr"] = lr
    graph = Capture()
    for i, row in enumerate(record_grads(ours.params, 5)):
        lr.fill_(0.1 / (i + 1))
        theirs.optimizer.param_groups[0]["lr"] = float(lr)
        theirs.train(row)
        ours.feed(row)
        if i == 2:
            with graph:
                ours.backward()
                ours.optimizer.step()
        if i < 2:
            with NoReads() if i else nullcontext():
                ours.backward()
                ours.optimizer.step()
        else:
            graph.replay()
    assert_same_bits(ours.params, theirs.params)


def test_gradients_of_another_form_keep_their_plan() -> None:
    """Transposed ones, one after the other: what the plan expects of the rest does not go back."""
    params = [Parameter(torch.ones(6, 4)) for _ in range(3)]
    optimizer = pysmooth.EFSGD(params, 1.0, pysmooth.Identity(), absorb=True, backend="cuda")
    uploads = []
    for _ in range(3):
        before = emulated.calls().uploads
        for p in params:
            p.grad = torch.arange(24.0).reshape(4, 6).t()
            optimizer.absorb_gradient(p)
        optimizer.step()
        uploads.append(emulated.calls().uploads - before)
    assert uploads[1:] == [0, 0]
    for p in params:
        assert torch.equal(p, 1 - 3 * torch.arange(24.0).reshape(4, 6).t())


def test_no_gradient_outlives_its_hook() -> None:
    ours = Training(pysmooth.ScaledSign(), "cuda")
    for _ in range(2):
        for p in ours.params:
            values = np.ones(p.shape, dtype=np.float32)
            memory = weakref.ref(values)
            p.grad = torch.from_numpy(values)
            del values
            ours.optimizer.absorb_gradient(p)
            assert memory() is None
        ours.optimizer.step()
