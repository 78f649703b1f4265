"""Which backends exist here, and which one takes which parameters."""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import torch  # before the native module, which shares torch's OpenMP pool
from torch import Tensor

from .._errors import BackendError
from .amp import Amp

if TYPE_CHECKING:
    from ..distributed.sharded import Sharding
    from ..optim._base import FusedOptimizer
    from .recipe import Recipe

Backend = Literal["auto", "cpu", "cuda", "triton", "eager"]


class Engine(Protocol):
    """Runs the steps of one optimizer."""

    name: str

    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One step over all groups; raises with everything as it was."""

    def settle(self, optimizer: FusedOptimizer) -> int:
        """Steps that were skipped on a device since the last call; raises what is to be raised."""

    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Takes one gradient into the states, and frees it; False if the policy keeps it out."""

    def selections(self) -> tuple[int, int]:
        """How many selections there were so far, and how many needed a second look."""

    def summed(self) -> int:
        """For how many gradients the last step used sums that were taken in backward."""

    def norms(self) -> list[float] | torch.Tensor | None:
        """The norms that the last step took, or None."""

    def coefs(self) -> list[float] | torch.Tensor | None:
        """The clip coefficients of the last step, one per parameter, or None."""


@dataclass(frozen=True)
class BackendInfo:
    """One backend.

    Attributes:
        name: as users write it.
        devices: types of device whose parameters it takes; None: all.
        auto: types for which "auto" takes it; of several backends, the first in `REGISTERED`.
        missing: why it cannot run in this process; None if it can.
        remedy: what to do about that.
        rules: names of the update rules that it has; None: all.
        lacks: what a recipe asks for and it has no kernel for, in words; None: nothing.
        absorbs: whether it takes gradients into states one by one.
        capturable: whether CUDA graphs can capture its steps.
        engine: makes the engine of one optimizer.
        sharded: makes of it one for parameters that are spread over processes; None: takes no such.
    """

    name: str
    devices: Callable[[], tuple[str, ...] | None]
    auto: tuple[str, ...]
    missing: Callable[[], str | None]
    remedy: str
    rules: Callable[[], frozenset[str] | None]
    lacks: Callable[[Recipe], str | None]
    engine: Callable[[], Engine]
    absorbs: bool = False
    capturable: bool = False
    sharded: Callable[[Engine, Sharding], Engine] | None = None

    def takes(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether all parameters are on devices that it takes."""
        devices = self.devices()
        return devices is None or {p.device.type for p in params} <= set(devices)

    def missing_kernel(self, recipes: Iterable[Recipe], absorbs: bool) -> str | None:
        """What it has no kernel for, in words; None: nothing."""
        if absorbs and not self.absorbs:
            return "absorb=True"
        return next((lack for r in recipes if (lack := self.lacks(r)) is not None), None)

    def require(self) -> None:
        """Raises BackendError, saying why, where it cannot run."""
        if (reason := self.missing()) is not None:
            raise BackendError(f"backend {self.name!r} is not available: {reason}. {self.remedy}")


# ---- cpu -----------------------------------------------------------------------------------------


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
        _named("cpu").require()
    assert isinstance(module, types.ModuleType)
    return module


def _cpu_missing() -> str | None:
    module = _load_native()
    return module if isinstance(module, str) else None


@cache
def native_rules() -> frozenset[str]:
    """Names of the update rules that the native CPU module has."""
    return frozenset(rule["name"] for rule in native_module().rules())


def _cpu_lacks(recipe: Recipe) -> str | None:
    return None if recipe.rule in native_rules() else repr(recipe.rule)


def _cpu_engine() -> Engine:
    from .native import NativeEngine

    return NativeEngine(native_module())


def _summed_on_host(inner: Engine, sharding: Sharding) -> Engine:
    from ..distributed.sharded import ShardedEngine

    return ShardedEngine(inner, sharding)


# ---- cuda ----------------------------------------------------------------------------------------


@cache
def _load_cuda() -> types.ModuleType | str:
    try:
        return importlib.import_module("pysmooth._cuda")
    except ImportError as error:
        return str(error)


@cache
def _cuda_missing() -> str | None:
    module = _load_cuda()
    if isinstance(module, str):
        return f"the CUDA module was not built ({module})"
    if module.device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    reason: str | None = module.missing()
    return reason


def cuda_module() -> types.ModuleType:
    """The native CUDA module, where it could be loaded."""
    module = _load_cuda()
    assert isinstance(module, types.ModuleType)
    return module


@cache
def _cuda_rules() -> frozenset[str]:
    return frozenset(rule["name"] for rule in cuda_module().rules())


def _cuda_devices() -> tuple[str, ...]:
    module = _load_cuda()  # the tests' own build takes CPU tensors for device memory
    return ("cuda",) if isinstance(module, str) else (module.device_type,)


def _cuda_lacks(recipe: Recipe) -> str | None:
    from .cuda import lacks

    return lacks(recipe, _cuda_rules())


def _cuda_engine() -> Engine:
    from .cuda import CudaEngine

    return CudaEngine(cuda_module())


def _summed_on_device(inner: Engine, sharding: Sharding) -> Engine:
    from ..distributed.sharded_device import DeviceShardedEngine

    return DeviceShardedEngine(inner, sharding)


# ---- triton --------------------------------------------------------------------------------------


def triton_interpreted() -> bool:
    """Whether Triton's interpreter is on: kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on")


@cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
        importlib.import_module("pysmooth.triton_kernels.rules")
    except ImportError as error:
        return str(error)
    if not triton_interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    return None


def _triton_rules() -> frozenset[str]:
    from ..triton_kernels.rules import RULES

    return frozenset(RULES)


def _triton_lacks(recipe: Recipe) -> str | None:
    from .triton import lacks

    return lacks(recipe)


def _triton_engine() -> Engine:
    from .triton import TritonEngine

    return TritonEngine()


# ---- eager ---------------------------------------------------------------------------------------


def _eager_engine() -> Engine:
    from .eager import EagerEngine

    return EagerEngine()


# ---- the table, fastest first --------------------------------------------------------------------

REGISTERED: tuple[BackendInfo, ...] = (
    BackendInfo(
        "cpu",
        devices=lambda: ("cpu",),
        auto=("cpu",),
        missing=_cpu_missing,
        remedy="Reinstall pysmooth with a C++17 compiler at hand, or pass backend='eager'",
        rules=native_rules,
        lacks=_cpu_lacks,
        engine=_cpu_engine,
        absorbs=True,
        sharded=_summed_on_host,
    ),
    BackendInfo(
        "cuda",
        devices=_cuda_devices,
        auto=("cuda",),
        missing=_cuda_missing,
        remedy="Reinstall pysmooth with PYSMOOTH_CUDA=1, where nvcc is, or pass backend='triton'",
        rules=_cuda_rules,
        lacks=_cuda_lacks,
        engine=_cuda_engine,
        absorbs=True,
        capturable=True,
        sharded=_summed_on_device,
    ),
    BackendInfo(
        "triton",
        devices=lambda: ("cuda", "cpu") if triton_interpreted() else ("cuda",),
        auto=("cuda",),  # ROCm's devices have that name too
        missing=_triton_missing,
        remedy="Install torch with GPU support, which brings triton, or pass backend='eager'",
        rules=_triton_rules,
        lacks=_triton_lacks,
        engine=_triton_engine,
        absorbs=True,
        capturable=True,
        sharded=_summed_on_device,
    ),
    BackendInfo(
        "eager",
        devices=lambda: None,
        auto=(),
        missing=lambda: None,
        remedy="",
        rules=lambda: None,
        lacks=lambda _: None,
        engine=_eager_engine,
        absorbs=True,
    ),
)
BACKENDS: tuple[str, ...] = ("auto", *(info.name for info in REGISTERED))


def _named(name: str) -> BackendInfo:
    return next(info for info in REGISTERED if info.name == name)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run in this process."""
    return tuple(info.name for info in REGISTERED if info.missing() is None)


def fastest(
    params: Iterable[torch.Tensor], recipes: Iterable[Recipe] = (), absorbs: bool = False
) -> str:
    """What "auto" stands for: the first backend of the table that is there for these devices.

    One that has no kernel for what is asked is passed over where a later one has.
    """
    params, recipes = list(params), list(recipes)
    types_ = {p.device.type for p in params} or {"cpu"}
    present = [i for i in REGISTERED if types_ <= set(i.auto) and i.missing() is None]
    able = [i for i in present if i.missing_kernel(recipes, absorbs) is None]
    return (able or present or [_named("eager")])[0].name


def resolve(
    backend: str,
    params: Iterable[torch.Tensor],
    recipes: Iterable[Recipe] = (),
    absorbs: bool = False,
) -> str:
    """The backend that takes these parameters: `backend` itself, or for "auto" the fastest present.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        BackendError: the backend asked for is not there, or not for the parameters' device, or has
            no kernel for what one of the `recipes` asks, or does not absorb gradients.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    params, recipes = list(params), list(recipes)
    info = _named(fastest(params, recipes, absorbs) if backend == "auto" else backend)
    info.require()
    if not info.takes(params):
        kinds = " and ".join(d.upper() for d in info.devices() or ())
        raise BackendError(
            f"backend {info.name!r} takes {kinds} parameters only; these are on "
            f"{sorted({p.device.type for p in params})}"
        )
    if (missing := info.missing_kernel(recipes, absorbs)) is not None:
        raise BackendError(
            f"the {info.name} backend has no kernel for {missing}, which these arguments ask "
            "for; backend='eager' computes it in plain torch"
        )
    return info.name


def is_capturable(name: str) -> bool:
    """Whether CUDA graphs can capture the steps of a backend."""
    return _named(name).capturable


def make_engine(name: str, sharding: Sharding | None = None) -> Engine:
    """An engine for one optimizer; `name` as `resolve` returns it.

    With `sharding`, one for parameters that are spread over processes.

    Raises:
        BackendError: the backend takes no such parameters.
    """
    info = _named(name)
    if sharding is None:
        return info.engine()
    if info.sharded is None:
        raise BackendError(
            f"the {name} backend takes no DTensor parameters and no process_group; all others do"
        )
    return info.sharded(info.engine(), sharding)
