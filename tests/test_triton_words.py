"""Memory that words are sent from: not filled again before the device is past the copy."""

from __future__ import annotations

import pytest
import torch

from pysmooth.engine.backends import triton_interpreted

pytestmark = pytest.mark.interpreted
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from pysmooth.triton_kernels.words import LAP, NO_AMP, Room, Rooms, Words, group_words, packed


class Device:
    """How far it is: events are done one by one."""

    def __init__(self) -> None:
        self.events: list[Device.Event] = []

    class Event:
        """Not done before somebody says so."""

        recorded = done = False

        def record(self) -> None:
            self.recorded = True

        def query(self) -> bool:
            assert self.recorded
            return self.done

    def event(self) -> Event:
        self.events.append(self.Event())
        return self.events[-1]


@pytest.fixture(name="device")
def a_device() -> Device:
    return Device()


@pytest.fixture(name="rooms")
def rooms_of(device: Device) -> Rooms:
    return Rooms(lambda: Room(1, torch.device("cpu")), device.event)


def take(rooms: Rooms, count: int, stream: int = 0) -> list[Room]:
    return [rooms.take(stream) for _ in range(count)]


def test_a_lap_is_filled_again_when_the_device_is_past_it(rooms: Rooms, device: Device) -> None:
    first = take(rooms, LAP)
    assert len(set(map(id, first))) == LAP
    second = take(rooms, LAP)  # nobody knows yet
    assert not {*map(id, first)} & {*map(id, second)}
    device.events[0].done = True
    assert take(rooms, LAP) == first
    device.events[1].done = True
    assert take(rooms, LAP) == second
    assert len(device.events) == 3  # the lap that is under way has none


def test_a_device_that_lags_gets_more_room(rooms: Rooms) -> None:
    assert len(set(map(id, take(rooms, 10 * LAP)))) == 10 * LAP


def test_another_stream_has_rooms_of_its_own(rooms: Rooms, device: Device) -> None:
    first = take(rooms, LAP + 1)
    device.events[0].done = True
    other = take(rooms, LAP, stream=7)
    assert not {*map(id, first)} & {*map(id, other)}


def test_what_is_sent_lies_where_kernels_look() -> None:
    words = Words(3, 1, torch.device("cpu"))
    row = group_words((0.5, 2.0), (1, 3.0, 0.0, 0.0, 0.0, -1.0, True), counts=False)
    words.send(packed((16, 0, 32)), row, packed((48, 64)))
    assert words.gradients.tolist() == [16, 0, 32, 0]
    assert words.hypers[:3].tolist() == [0.5, 2.0, 0.0]
    assert words.hypers[16:].tolist() == [1, 3.0, 0.0, 0.0, 0.0, -1.0, -1.0, 0.0]
    assert words.amp.tolist() == [48, 64]
    words.send(packed((0, 0, 0)), row, NO_AMP)
    assert words.amp.tolist() == [0, 0]
    assert not words.gradients.any()
