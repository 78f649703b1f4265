"""The emulated CUDA backend as on a GPU: nothing waits for the device, and steps are captured."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from simt import emulated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pysmooth.engine import cuda_memory


@pytest.fixture(name="late")
def on_a_late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the engine does not ask what became of a step unless somebody wants to know."""
    monkeypatch.setattr(cuda_memory, "is_late", lambda _: True)


class NoReads(TorchDispatchMode):
    """Nothing may wait for the device: no number is read, nothing is copied between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name
        # From one dtype to another, where it is.
        moves = name != "aten::_to_copy" or "device" in (kwargs or {})
        assert "copy" not in name or not moves, name
        return func(*args, **(kwargs or {}))


class Capture:
    """A CUDA graph's capture and replay, in the stub of the runtime."""

    def __init__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._runtime: ctypes.CDLL = emulated.kernels()
        self.kept: list[Tensor] = []

    def __enter__(self) -> Capture:
        self._patch.setattr(cuda_memory, "stream_of", lambda _: (7, True))
        empty_like = torch.empty_like

        def kept(*args: Any, **kwargs: Any) -> Tensor:  # as a graph's pool keeps it
            self.kept.append(empty_like(*args, **kwargs))
            return self.kept[-1]

        self._patch.setattr(torch, "empty_like", kept)
        self._runtime.runtime_capture(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.runtime_capture(0)
        self._patch.undo()

    def replay(self) -> None:
        self._runtime.runtime_replay()
