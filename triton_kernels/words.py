"""What a step may bring anew, and how it gets to the device."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .launch import current_stream, is_late
from .table import GROUP_HYPER, GROUP_WORDS

LAP = 8  # rooms that are filled before anybody asks whether the device is done with one


class Room:
    """Memory of the host that words are sent from: as a tensor, and as bytes."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.words = torch.zeros(count, dtype=torch.int64, pin_memory=is_late(device))
        memory = (ctypes.c_char * (8 * count)).from_address(self.words.data_ptr())
        self.bytes = memoryview(memory).cast("B")


class Rooms:
    """Rooms that are sent from in turn.

    A lap of them is filled again when the device is past the last copy out of it: an event says so.
    Where it is not, there is one lap more. On another stream they are all new: torch keeps the
    memory of copies that are under way.
    """

    def __init__(self, make: Callable[[], Room], event: Callable[[], Any]) -> None:
        self._make, self._event = make, event
        self._stream: int | None = None
        self._before: list[tuple[list[Room], Any]] = []  # laps and their events; oldest first
        self._lap: list[Room] = []
        self._taken = 0

    def take(self, stream: int | None) -> Room:
        """A room that nothing is being sent from, to be sent from on this stream."""
        if stream != self._stream:
            self._stream, self._before, self._lap, self._taken = stream, [], [], 0
        if self._taken == LAP:
            event = self._event()
            event.record()
            self._before.append((self._lap, event))
            self._lap, self._taken = [], 0
            if self._before[0][1].query():
                self._lap = self._before.pop(0)[0]
        if self._taken == len(self._lap):
            self._lap.append(self._make())
        self._taken += 1
        return self._lap[self._taken - 1]


@dataclass
class Words:
    """Addresses of gradients, numbers of groups, AMP's two tensors: one copy sends them."""

    tensors: int
    groups: int
    device: torch.device
    device_words: Tensor = field(init=False)
    sent: tuple[Any, ...] = ()
    host: Tensor | None = None
    owned: bool = False  # by a graph: what is sent stays where it was sent from, for replays

    def __post_init__(self) -> None:
        self._floats = self.tensors + self.tensors % 2  # 16-byte boundaries
        self._amp = self._floats + self.groups * GROUP_WORDS.value
        self.device_words = torch.zeros(self._amp + 2, dtype=torch.int64, device=self.device)
        self._rooms = Rooms(partial(Room, self._amp + 2, self.device), torch.cuda.Event)
        # Where no copy is ever under way when the next one is made, one is enough.
        alone = self.owned or not is_late(self.device)
        self._own = Room(self._amp + 2, self.device) if alone else None

    def _room(self) -> Room:
        return self._rooms.take(current_stream(self.device))

    @property
    def gradients(self) -> Tensor:
        """Addresses; 0 for a tensor that sits out the step."""
        return self.device_words[: self._floats]

    @property
    def hypers(self) -> Tensor:
        """Rows of groups."""
        return self.device_words[self._floats : self._amp].view(torch.float64)

    @property
    def amp(self) -> Tensor:
        """Addresses of the loss scale and of its overflow flag; 0: none."""
        return self.device_words[self._amp :]

    def send(self, gradients: bytes, hypers: bytes, amp: bytes) -> None:
        """Sends what changed: all of it or, usually, nothing."""
        news = (gradients, hypers, amp)
        if news == self.sent:
            return
        room = self._own or self._room()
        room.bytes[: len(gradients)] = gradients
        room.bytes[8 * self._floats : 8 * self._amp] = hypers
        room.bytes[8 * self._amp :] = amp
        self.device_words.copy_(room.words, non_blocking=True)
        self.sent, self.host = news, room.words


def packed(addresses: Iterable[int]) -> bytes:
    """Addresses as words."""
    return array("q", addresses).tobytes()


NO_AMP = packed((0, 0))


def group_words(hyper: Sequence[float], clip: Sequence[float], counts: bool) -> bytes:
    """A group's row: hyper-parameters, then the numbers of a ClipSpec."""
    *numbers, maximize = clip
    row = [*hyper, *[0.0] * (GROUP_HYPER - len(hyper)), *numbers, -1.0 if maximize else 1.0]
    return array("d", [*row, counts]).tobytes()
