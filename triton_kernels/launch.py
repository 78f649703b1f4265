"""Launches: a kernel, what it is specialised for, and its arguments, bound once.

Everything that changes from step to step is in tables on the device. So a launch has the same
arguments for ever, and after the first time goes straight to the compiled kernel, past the part of
Triton that looks at arguments to find it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .tuning import INTERPRETED


@dataclass(frozen=True)
class Spec:
    """A kernel with the values of its constexpr parameters."""

    kernel: Any
    constants: tuple[tuple[str, Any], ...]
    warps: int

    def having(self, **values: Any) -> Spec:
        """The same with other values of some parameters."""
        constants = tuple((name, values.get(name, old)) for name, old in self.constants)
        return Spec(self.kernel, constants, self.warps)

    @property
    def options(self) -> dict[str, Any]:
        """No a * b + c becomes one rounding, as in every backend."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}


class Launch:
    """One launch of a step.

    The first call compiles, and finds out that all tables lie at 16-byte boundaries. After that
    tables go by their addresses: a tensor would be asked for its own, and the driver if it is on
    the device, at every launch.
    """

    def __init__(self, spec: Spec, programs: int, arguments: Sequence[torch.Tensor | int]) -> None:
        self.spec = spec
        self.grid = (programs, 1, 1)
        self.arguments = tuple(arguments)
        self._constants = tuple(value for _, value in spec.constants)
        addresses = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.arguments)
        self._bound = tuple(addresses)
        self._kernel: Any = None
        self._compiled: Any = None
        self._direct: Direct | None = None

    def follow(self, other: Launch) -> None:
        """Takes the kernel that a launch of the same spec and grid has found."""
        if other._kernel is not None:
            self._take(other._kernel)

    def _take(self, kernel: Any) -> None:
        self._kernel, self._compiled = kernel, kernel[self.grid]
        self._direct = Direct.of(kernel, self.grid, (*self._bound, *self._constants))

    def __call__(self, stream: int | None = None, values: tuple[int, ...] = ()) -> None:
        """Launches on a stream of the current device; None: the current one.

        `values` come after the arguments: integers whose type the kernel says.
        """
        if self.grid[0] == 0:  # nothing but empty tensors
            return
        if self._direct is not None and not values and stream is not None and not _is_told():
            self._direct(stream)
            return
        if self._compiled is not None:
            self._compiled(*self._bound, *values, *self._constants, stream=stream)
            return
        given = (*self.arguments, *values, *self._constants)
        made = self.spec.kernel[self.grid](*given, **self.spec.options)
        if not INTERPRETED:
            self._take(made)


class Direct:
    """What Triton's launcher calls for a launch, after everything that it makes out in Python.

    Found by letting it make that out once. These are insides of Triton (3.6 to 3.9 have them), so
    whatever looks otherwise is left alone: of() says None, and launches go through the launcher.
    """

    def __init__(self, launch: Callable[..., object], given: tuple[Any, ...], at: int) -> None:
        self._launch, self._given, self._at = launch, given, at
        self._stream = given[at]

    @staticmethod
    def of(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> Direct | None:
        """The call for these arguments; None where the launcher does more than call."""
        launcher = getattr(kernel, "run", None)
        launch = getattr(launcher, "launch", None)
        busy = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
        if _HOOKS is None or not callable(launch) or any(getattr(launcher, x, 0) for x in busy):
            return None
        told: list[tuple[Any, ...]] = []
        stream = object()
        apart: Any = copy.copy(launcher)  # another thread may be launching with it
        apart.launch = lambda *given: told.append(given)
        try:
            apart(*grid, stream, kernel.function, kernel.packed_metadata, *[None] * 3, *arguments)
        except (AttributeError, TypeError):
            return None
        places = [i for given in told for i, x in enumerate(given) if x is stream]
        return Direct(launch, told[0], places[0]) if len(told) == len(places) == 1 else None

    def __call__(self, stream: int) -> None:
        """Launches on a stream of the current device."""
        if stream != self._stream:  # else they are in a tuple already
            before, after = self._given[: self._at], self._given[self._at + 1 :]
            self._given, self._stream = (*before, stream, *after), stream
        self._launch(*self._given)


# Whoever wants to be told of launches, a profiler for example, leaves a function there.
_HOOKS: Any = getattr(getattr(triton, "knobs", None), "runtime", None)


def _is_told() -> bool:
    """Whether somebody is told of launches: that is the launcher's business."""
    for hook in (_HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def is_late(device: torch.device) -> bool:
    """Whether a device does its work behind the host's back: the interpreter does not."""
    return device.type == "cuda"


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return is_late(device) and torch.cuda.is_current_stream_capturing()


# What torch.cuda.current_stream() asks, without an object for the answer; Triton uses it, too.
_RAW_STREAM: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """The stream that torch works on; CUDA's and ROCm's."""
    if _RAW_STREAM is not None and device.index is not None:
        return _RAW_STREAM(device.index)
    return torch.cuda.current_stream(device).cuda_stream
