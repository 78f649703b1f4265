"""The experiments: every file of `experiments/` has one."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from . import experiments
from .outcome import Experiment


def found() -> dict[str, Experiment]:
    """All, by id.

    Raises:
        ValueError: a file has none, or two have the same id.
    """
    out: dict[str, Experiment] = {}
    for info in sorted(pkgutil.iter_modules(experiments.__path__), key=lambda i: i.name):
        experiment = _of(importlib.import_module(f"{experiments.__name__}.{info.name}"))
        if experiment.id in out:
            raise ValueError(f"two experiments are called {experiment.id!r}")
        out[experiment.id] = experiment
    return out


def _of(module: ModuleType) -> Experiment:
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{module.__name__} has no EXPERIMENT")
    return experiment


def need(module: str) -> ModuleType:
    """A package that only this command needs.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`papers` needs {module.split('.')[0]}: pip install 'pysmooth[papers]'"
        ) from error
