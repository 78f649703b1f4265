"""`python -m pysmooth.doctor`. Once imported, the module can be called: it hides the function."""

from __future__ import annotations

import sys
import types

from ._doctor import doctor, report

__all__ = ["doctor", "report"]


class _Callable(types.ModuleType):
    def __call__(self) -> None:
        doctor()


if __name__ == "__main__":
    doctor()
else:
    sys.modules[__name__].__class__ = _Callable
