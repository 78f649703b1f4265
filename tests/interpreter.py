"""Triton's interpreter, for tests: one that patches triton.language once, not once per call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _uncounted() -> Iterator[None]:
    """coverage.py looks away: to watch the interpreter would take twice its time."""
    tracer = sys.gettrace()
    if not type(tracer).__module__.startswith("coverage"):  # a debugger, or nobody
        yield
        return
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
        _called()


def _called() -> None:
    """coverage.py takes up its place with the next call, which must come before the next return."""


def tame() -> None:
    """Makes the interpreter some five times faster, and leave numpy's warnings alone.

    It replaces the functions of triton.language before it runs a kernel, and again in every call of
    a device function. That they stay replaced does no harm in a process that compiles nothing.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    class Kept:
        def restore(self) -> None:
            pass

    def once(fn: Any) -> Kept:
        seen = tuple(id(lang) for lang in fn.__globals__.values() if lang is tl or lang is tl.core)
        if seen not in patched:
            patched.add(seen)
            patch(fn)
            # Triton 3.6 leaves this to numpy, which no longer takes arrays of one element.
            tl.tensor.__index__ = lambda x: int(x.handle.data.item())
        return Kept()

    call = interpreter.GridExecutor.__call__

    def quietly(self: Any, *args: Any, **kwargs: Any) -> None:
        # Infinities and NaN are what some tests are about. Threads have this each for themselves.
        with np.errstate(all="ignore"), _uncounted():
            call(self, *args, **kwargs)

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = quietly
