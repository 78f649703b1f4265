"""Optional dependencies: imported where they are used, missed with the name of their extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def needs(module: str, *, extra: str) -> ModuleType:
    """The module; without it, an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise  # it is there, and lacks something itself
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'pysmooth[{extra}]'"
        ) from None
