"""Which backends exist here, and which one takes which parameters."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import torch  # before the native module, which shares torch's OpenMP pool

from .._errors import BackendError

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer

Backend = Literal["auto", "cpu", "eager"]
BACKENDS: tuple[str, ...] = ("auto", "cpu", "eager")


class Engine(Protocol):
    """Runs the steps of one optimizer."""

    name: str

    def step(self, optimizer: FusedOptimizer, unscale: float) -> None:
        """One step over all groups; raises with everything as it was."""

    def selections(self) -> tuple[int, int]:
        """How many selections there were so far, and how many needed a second look."""

    def summed(self) -> int:
        """For how many gradients the last step used sums that were taken in backward."""

    def norms(self) -> list[float] | torch.Tensor | None:
        """The norms that the last step took, or None."""

    def coefs(self) -> list[float] | torch.Tensor | None:
        """The clip coefficients of the last step, one per parameter, or None."""


@cache
def _load_native() -> types.ModuleType | str:
    try:
        return importlib.import_module("pysmooth._cpu")
    except ImportError as error:
        return str(error)


def native_module() -> types.ModuleType:
    """The native CPU module. Raises BackendError, saying why, where it cannot be loaded."""
    module = _load_native()
    if isinstance(module, str):
        raise BackendError(
            f"backend 'cpu' is not available: {module}. Reinstall pysmooth with a C++17 compiler "
            "at hand, or pass backend='eager'"
        )
    return module


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run in this process."""
    return ("eager",) if isinstance(_load_native(), str) else ("cpu", "eager")


def resolve(backend: str, params: Iterable[torch.Tensor], rules: Iterable[str] = ()) -> str:
    """The backend that takes these parameters: `backend` itself, or for "auto" the fastest present.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        BackendError: the backend asked for is not built, or not for the parameters' device, or has
            no kernel for one of the `rules`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    devices = {p.device.type for p in params}
    if backend == "cpu":
        native_module()
        if not devices <= {"cpu"}:
            raise BackendError(
                f"backend 'cpu' takes CPU parameters only; these are on {sorted(devices)}"
            )
    if backend == "auto":
        backend = "cpu" if devices <= {"cpu"} and "cpu" in available_backends() else "eager"
    if backend == "cpu":
        known = native_rules()
        for rule in rules:
            if rule not in known:
                raise BackendError(
                    f"the cpu backend has no kernel for {rule!r}, which these arguments ask for; "
                    "backend='eager' computes it in plain torch"
                )
    return backend


@cache
def native_rules() -> frozenset[str]:
    """Names of the update rules that the native CPU module has."""
    return frozenset(rule["name"] for rule in native_module().rules())


def make_engine(name: str) -> Engine:
    """An engine for one optimizer; `name` as `resolve` returns it."""
    if name == "cpu":
        from .native import NativeEngine

        return NativeEngine(native_module())
    from .eager import EagerEngine

    return EagerEngine()
