"""EFSGD(absorb=True) in captured steps: what replays take in, and what the host is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from absorbing import Training
from battery import assert_same_bits, record_grads

import pysmooth
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from capturing import capture, late  # noqa: F401 - a fixture

COMPRESSORS = (
    pysmooth.TopK(ratio=0.05),
    pysmooth.ScaledSign(),
    pysmooth.QSGD(4, scope="block", seed=1),
)


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_replays_and_other_steps(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same training without a graph; one gradient of a replay is not finite."""
    ours, theirs = Training(compressor, "triton"), Training(compressor, "triton")
    rows = record_grads(ours.params, 6)
    rows[4][0][7] = float("nan")
    ours.train(rows[0])
    with capture(monkeypatch) as graph:
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


@pytest.mark.usefixtures("_late")
def test_a_captured_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device counts what replays take in: weight decay comes once, and the host can ask."""
    ours, theirs = (Training(pysmooth.TopK(k=9), "triton") for _ in range(2))
    rows = record_grads(ours.params, 4)
    for one in (ours, theirs):
        one.train(rows[0])
    with capture(monkeypatch) as graph:
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


@pytest.mark.usefixtures("_late")
def test_the_first_gradient_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Training(pysmooth.ScaledSign(), "triton")
    ours.feed(record_grads(ours.params, 1)[0])
    with capture(monkeypatch), pytest.raises(pysmooth.BackendError, match="same step once before"):
        ours.backward()
    assert not ours.optimizer.state
