"""A plan that never fits what it was made for: a clear end, and nothing left of the attempt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import pysmooth
from pysmooth.engine import native


class Stale:
    """A plan of the native module's form, of whose tensors another one always moves."""

    reduced = False

    def __init__(self, **_: Any) -> None:
        self.steps = 0

    def step(self, *_: Any) -> int:
        self.steps += 1
        return native.STALE

    def absorb(self, *_: Any) -> int:
        return native.STALE

    def applied(self) -> bool:
        return False

    def selections(self) -> tuple[int, int]:
        return (0, 0)


class Module:
    """The native module, but for its plans."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.plans: list[Stale] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def Plan(self, **given: Any) -> Stale:  # noqa: N802
        self.plans.append(Stale(**given))
        return self.plans[-1]


def spoiled(optimizer: Any) -> Module:
    engine = optimizer._ready_engine()
    engine._native = Module(engine._native)
    module: Module = engine._native
    engine._plan = None
    return module


def test_a_step_tries_twice() -> None:
    p = Parameter(torch.ones(3))
    optimizer = pysmooth.AdamW([p], lr=0.1, backend="cpu")
    p.grad = torch.ones(3)
    module = spoiled(optimizer)
    with pytest.raises(RuntimeError, match="changed while the step was gathered"):
        optimizer.step()
    assert [plan.steps for plan in module.plans] == [1, 1]
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_states_of_before_stay() -> None:
    """Those that were there, with what a load took away of them, are as they were."""
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    optimizer = pysmooth.AdamW([p, q], lr=0.1, backend="cpu")
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()
    del optimizer.state[q]["exp_avg"]
    held = {x: dict(optimizer.state[x]) for x in (p, q)}
    bits = [x.detach().clone() for x in (p, q)]
    spoiled(optimizer)
    with pytest.raises(RuntimeError, match="changed while the step was gathered"):
        optimizer.step()
    for x, before in zip((p, q), bits, strict=True):
        assert torch.equal(x, before)
        assert optimizer.state[x].keys() == held[x].keys()
        assert all(optimizer.state[x][key] is value for key, value in held[x].items())


def test_an_absorbed_gradient_is_kept() -> None:
    p = Parameter(torch.ones(3))
    optimizer = pysmooth.EFSGD(
        [p], 0.1, pysmooth.TopK(k=1), absorb=True, nonfinite="skip", backend="cpu"
    )
    spoiled(optimizer)
    with pytest.raises(RuntimeError, match="changed while a gradient was absorbed"):
        (2.0 * p).sum().backward()
    assert p.grad is not None
    assert not optimizer.state


@pytest.mark.parametrize("absorb", [False, True])
def test_usual_steps_keep_their_plan(absorb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(4))]
    optimizer = pysmooth.EFSGD(
        params, 0.1, pysmooth.TopK(k=1), absorb=absorb, nonfinite="skip", backend="cpu"
    )

    def step() -> None:
        optimizer.zero_grad()
        sum((2.0 * p).sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()

    step()
    build = native.NativeEngine._build
    built: list[int] = []

    def counted(self: Any, *given: Any) -> Any:
        built.append(1)
        return build(self, *given)

    monkeypatch.setattr(native.NativeEngine, "_build", counted)
    step()
    step()
    assert not built
    optimizer.state[params[0]] = dict(optimizer.state[params[0]])
    step()
    assert len(built) == 1
