"""Launches: a kernel, what it is specialised for, and its arguments, bound once.

Everything that changes from step to step is in tables on the device. So a launch has the same
arguments for ever, and after the first time goes straight to the compiled kernel, past the part of
Triton that looks at arguments to find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
        self._compiled: Any = None

    def follow(self, other: Launch) -> None:
        """Takes the kernel that a launch of the same spec and grid has found."""
        self._compiled = other._compiled

    def __call__(self, stream: int | None = None, values: tuple[int, ...] = ()) -> None:
        """Launches on a stream of the current device; None: the current one.

        `values` come after the arguments: integers whose type the kernel says.
        """
        if self.grid[0] == 0:  # nothing but empty tensors
            return
        if self._compiled is not None:
            self._compiled(*self._bound, *values, *self._constants, stream=stream)
            return
        given = (*self.arguments, *values, *self._constants)
        made = self.spec.kernel[self.grid](*given, **self.spec.options)
        if not INTERPRETED:
            self._compiled = made[self.grid]


def is_late(device: torch.device) -> bool:
    """Whether a device does its work behind the host's back: the interpreter does not."""
    return device.type == "cuda"


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return is_late(device) and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The stream that torch works on; CUDA's and ROCm's."""
    return torch.cuda.current_stream(device).cuda_stream
