"""Captures of steps of the Triton backend, without a device: launches are recorded, then run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pysmooth.triton_kernels import plan
from pysmooth.triton_kernels.launch import Launch
from pysmooth.triton_kernels.words import Words


class Graph:
    """The launches of a capture, after what they read was sent."""

    def __init__(self) -> None:
        self.launches: list[tuple[Launch, tuple[int, ...]]] = []
        self.words: Words | None = None

    def replay(self) -> None:
        """What a graph does: the copy out of the host's memory, then the launches."""
        if self.words is not None:
            assert self.words.host is not None
            self.words.device_words.copy_(self.words.host)
        for recorded, values in self.launches:
            recorded(None, values)


@pytest.fixture(name="_late")
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a device that works behind the host's back."""
    monkeypatch.setattr(plan, "is_late", lambda _: True)


@contextmanager
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """Records launches; no table may be made meanwhile."""
    graph = Graph()
    with monkeypatch.context() as patched:
        for module in ("triton_kernels.plan", "engine.triton"):
            patched.setattr(f"pysmooth.{module}.captures", lambda _: True)
        patched.setattr(
            Launch, "__call__", lambda x, _, values=(): graph.launches.append((x, values))
        )
        patched.setattr(Words, "__post_init__", lambda _: pytest.fail("memory in a capture"))
        patched.setattr(Words, "_room", lambda _: pytest.fail("pinned memory in a capture"))
        send = Words.send

        def sent(words: Words, *news: Any) -> None:
            graph.words = words
            send(words, *news)

        patched.setattr(Words, "send", sent)
        yield graph
