"""What a captured step of the Triton backend owns: replays and other steps do not meet.

There is no device here: a step is captured by recording its launches, and replayed by running them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import advance, assert_same_bits, make_params, record_grads, set_grads
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from capturing import capture, late  # noqa: F401 - a fixture
from pysmooth.triton_kernels import launch
from pysmooth.triton_kernels.plan import SPARES

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (pysmooth.AdamW, {"lr": 0.01, "max_norm": 1.0, "capturable": True}),
    "momentum": (pysmooth.ClipSGD, {"lr": 0.1, "momentum": 0.9, "max_norm": 1.0}),
    "rows": (pysmooth.ClipSGD, {"lr": 0.1, "clip": "agc"}),
    "top_k": (pysmooth.EFSGD, {"lr": 0.1, "compressor": pysmooth.TopK(ratio=0.05)}),
    "blocks": (pysmooth.EFSGD, {"lr": 0.1, "compressor": pysmooth.QSGD(4, scope="block")}),
    "plus": (pysmooth.EF21Plus, {"lr": 0.1, "compressor": pysmooth.TopK(ratio=0.05)}),
}


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize("name", METHODS)
def test_replays_and_other_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same steps without a graph."""
    make, kwargs = METHODS[name]
    shapes = ((5003,), (7, 5), ())
    params, twins = make_params(shapes), make_params(shapes)
    ours, theirs = (make(p, backend="triton", **kwargs) for p in (params, twins))
    rows = record_grads(params, 6)
    static = [torch.zeros_like(p) for p in params]

    def feed(row: list[Tensor]) -> None:
        for held, value in zip(static, row, strict=True):
            held.copy_(value)

    for p, g in zip(params, static, strict=True):
        p.grad = g
    feed(rows[0])
    ours.step()
    with capture(monkeypatch) as graph:
        ours.step()
    assert graph.launches
    for i, row in enumerate(rows[1:]):
        if i % 2:  # a step beside the graph, with gradients and a learning rate of its own
            ours.param_groups[0]["lr"] = 0.03
            set_grads(params, row)
            ours.step()
        else:
            feed(row)
            graph.replay()
    advance(theirs, twins, rows[:2])
    for i, row in enumerate(rows[2:]):
        theirs.param_groups[0]["lr"] = kwargs["lr"] if i % 2 else 0.03
        advance(theirs, twins, [row])
    assert_same_bits(params, twins)


@pytest.mark.usefixtures("_late")
def test_a_learning_rate_on_the_device_is_read_at_every_replay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy into the graph's own table is part of the graph."""
    monkeypatch.setattr("pysmooth.engine.triton.LATE", ("cpu",))
    (p,) = make_params([(4,)])
    lr = torch.tensor(0.5)
    optimizer = pysmooth.ClipSGD([p], lr, backend="triton")
    p.grad = torch.ones(4)
    optimizer.step()
    copies: list[tuple[Tensor, Tensor]] = []
    with capture(monkeypatch) as graph, monkeypatch.context() as patched:
        copy = Tensor.copy_
        patched.setattr(
            Tensor, "copy_", lambda a, b, **kw: (copies.append((a, b)), copy(a, b, **kw))[1]
        )
        optimizer.step()
    (target, source) = copies[-1]
    assert source.data_ptr() == lr.data_ptr()
    assert graph.words is not None
    assert target.untyped_storage().data_ptr() == graph.words.device_words.data_ptr()


@pytest.mark.usefixtures("_late")
def test_each_capture_has_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many without a step in between; then they are made anew, by a step."""
    (p,) = make_params([(4,)])
    optimizer = pysmooth.ClipSGD([p], 1.0, backend="triton")
    p.grad = torch.ones(4)
    optimizer.step()
    graphs = []
    for i in range(SPARES):
        optimizer.param_groups[0]["lr"] = float(i)
        with capture(monkeypatch) as graph:
            optimizer.step()
        graphs.append(graph)
    with capture(monkeypatch), pytest.raises(RuntimeError, match="tables for 4 captures"):
        optimizer.step()
    with torch.no_grad():
        p.zero_()
    for graph in (graphs[3], graphs[1]):
        graph.replay()
    assert torch.equal(p.detach(), torch.full((4,), -4.0))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    with capture(monkeypatch) as graph:
        optimizer.step()
    assert graph.launches
    graphs[2].replay()
    assert torch.equal(p.detach(), torch.full((4,), -6.0))


@pytest.mark.usefixtures("_late")
def test_a_plan_is_not_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Parameter(torch.ones(3))
    optimizer = pysmooth.ClipSGD([p], 1.0, momentum=0.9, backend="triton")
    p.grad = torch.ones(3)
    with capture(monkeypatch), pytest.raises(pysmooth.BackendError, match="same step once before"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert not optimizer.state
    optimizer.step()
    kept = optimizer._engine
    with capture(monkeypatch):
        optimizer.step()
    assert getattr(kept, "_plan") in optimizer._kept_for_graphs  # type: ignore[attr-defined]  # noqa: B009


def test_nothing_is_captured_on_the_cpu() -> None:
    assert not launch.captures(torch.device("cpu"))
    assert not launch.is_late(torch.device("cpu"))
