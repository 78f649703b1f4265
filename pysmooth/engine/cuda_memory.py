"""Plans' memory on GPUs, the streams that launches go to, and what several devices tell each other.

Where tensors lie on several devices each has a plan of all of them, works on its own, and is told a
few numbers of the others' (csrc/cuda/board.cuh): by copies from stream to stream, between phases of
launches. No host waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .._errors import BackendError

if TYPE_CHECKING:
    from .._cuda import Site

T = TypeVar("T")
# What torch.cuda.current_stream() asks, without an object for the answer; Triton uses it, too.
_RAW_STREAM: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class PlanMemory:
    """A plan's memory on a device, and the stream that launches on it went to last.

    Attributes:
        device: where it is.
        plan: what kernels leave to each other, and to the host.
        board: what devices tell each other, a row each; none where there is one device.
        captured: whether graphs hold launches on it.
        inputs_at: where a step's numbers are written to, outside of captures.
    """

    def __init__(self, site: Site, device: torch.device) -> None:
        self.device, self.captured = device, False
        self.plan = torch.empty(site.bytes, dtype=torch.uint8, device=device)
        self._inputs = torch.empty(site.input_bytes, dtype=torch.uint8, device=device)
        self.inputs_at = self._inputs.data_ptr()
        at, row = site.board
        board = self.plan[at : at + site.count * row]
        self.board = board.view(site.count, row) if row else None
        with _current(device):
            self._stream, _ = stream_of(device)
            site.upload(self.plan.data_ptr(), self._stream)

    def captures(self) -> bool:
        """Whether a CUDA graph is captured on the current stream."""
        with _current(self.device):
            return stream_of(self.device)[1]

    def ready(self) -> int | None:
        """The current stream, where it is that of the last launch, and nothing is captured on it.

        None: some other one, or nobody can tell so quickly. launch() then does what has to be done.
        """
        index = self.device.index
        if not self.plan.is_cuda:
            stream, captures = stream_of(self.device)
        elif _RAW_STREAM is None or torch._C._cuda_getDevice() != index:
            return None
        else:
            stream, captures = _RAW_STREAM(index), torch._C._cuda_isCurrentStreamCapturing()
        return None if captures or stream != self._stream else stream

    def is_free(self) -> bool:
        """Whether a launch now keeps its distance from others: as it is on their stream.

        Replays go to any stream. What a graph has is for captures alone from then on.
        """
        with _current(self.device):
            stream, captures = stream_of(self.device)
        return captures or (stream == self._stream and not self.captured)

    def launch(self, run: Callable[[int, int], T], keep: Callable[[], None]) -> T:
        """What run(address of the step's inputs, stream) says.

        keep() is called in the capture of a graph, which needs the memory from then on.
        """
        with _current(self.device):
            stream, captures = self._use(keep)
            # Part of the graph's own memory, as everything that is allocated in a capture.
            inputs = torch.empty_like(self._inputs) if captures else self._inputs
            return run(inputs.data_ptr(), stream)

    def enqueue(self, run: Callable[[int], None], keep: Callable[[], None]) -> None:
        """run(stream), of what brings its numbers along; keep as above."""
        with _current(self.device):
            run(self._use(keep)[0])

    def _use(self, keep: Callable[[], None]) -> tuple[int, bool]:
        stream, captures = stream_of(self.device)
        if captures:
            self.captured = True
            keep()
            return stream, True
        if stream != self._stream and self.plan.is_cuda:
            for memory in (self.plan, self._inputs):
                memory.record_stream(torch.cuda.current_stream(self.device))
        self._stream = stream
        return stream, False


# ---- several devices -----------------------------------------------------------------------------


def home(t: Tensor) -> torch.device:
    """The device that a tensor lies on."""
    return t.device


def sites_of(tensors: Iterable[Tensor]) -> tuple[list[int], list[torch.device]]:
    """At which site each tensor is, and the sites' devices, numbered as they come."""
    devices: dict[torch.device, int] = {}
    numbers = [devices.setdefault(home(t), len(devices)) for t in tensors]
    return numbers, list(devices)


def run_on_all(
    memories: Sequence[PlanMemory],
    launch: Callable[[int, int, int, int], int],
    keep: Callable[[], None],
    meet: Callable[[int], None] | None = None,
) -> None:
    """launch(site, phase, inputs, stream) everywhere, phase by phase; it says how many there are.

    Between two of them meet(the first one's number), or rows of boards are copied.

    Raises:
        BackendError: a CUDA graph is captured, and there are several devices, or processes.
    """
    if any(memory.captures() for memory in memories) and (len(memories) > 1 or meet is not None):
        where = ", ".join(str(memory.device) for memory in memories)
        raise BackendError(
            "backend 'cuda' cannot capture in a CUDA graph what works on several "
            + (f"devices, {where}" if meet is None else "processes")
        )
    phase, phases = 0, 1
    while phase < phases:
        if phase > 0 and meet is not None:
            meet(phase - 1)
        elif phase > 0:
            _meet([memory.board for memory in memories if memory.board is not None])
        for site, memory in enumerate(memories):
            phases = memory.launch(partial(launch, site, phase), keep)
        phase += 1


def _meet(boards: list[Tensor]) -> None:
    """Every device's row goes to all others, by way of the first one.

    torch's copies between devices are ordered after what both current streams hold, and before what
    comes next on either.
    """
    first, *others = boards
    for site, board in enumerate(others, 1):
        first[site].copy_(board[site], non_blocking=True)
    for board in others:
        board.copy_(first, non_blocking=True)


# ---- streams -------------------------------------------------------------------------------------


def is_late(device: torch.device) -> bool:
    """Whether a device does its work behind the host's back: the emulation does not."""
    return device.type == "cuda"


def stream_of(device: torch.device) -> tuple[int, bool]:
    """The stream to launch on, and whether a CUDA graph is captured on it."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that launches go to."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
