"""Interleaved timing: A B C A B C ..., so that a machine which changes speed changes it for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timed:
    """Seconds per round of one contestant."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """The interquartile range, in seconds: the spread of the middle half."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def device_clock(device: str) -> Clock:
    """Wall time, after waiting for the device where there is one."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
    prepare: Callable[[], object] | None = None,
    seconds: float | None = None,
) -> dict[str, Timed]:
    """Times every contestant once per round, in rotating order.

    Args:
        contestants: what to time, by name.
        rounds: rounds that count.
        warmup: rounds before those that do not.
        clock: time in seconds.
        prepare: run, untimed, before each contestant (fresh gradients, say).
        seconds: stop early, after at least 3 rounds, once this much time has passed.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    began = time.perf_counter()
    for turn in range(warmup + rounds):
        # Rotated, so that nobody always runs on the caches that the same neighbour left behind.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if prepare is not None:
                prepare()
            start = clock()
            contestants[name]()
            elapsed = clock() - start
            if turn >= warmup:
                times[name].append(elapsed)
        enough = turn >= warmup + 2
        if seconds is not None and enough and time.perf_counter() - began > seconds:
            break
    return {name: Timed(values) for name, values in times.items()}


def ratio_quartiles(rival: Timed, ours: Timed) -> tuple[float, float]:
    """Between which ratios the middle half of the rounds lies."""
    ratios = [r / o for r, o in zip(rival.seconds, ours.seconds, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4)
    return low, high


def ratio(rival: Timed, ours: Timed) -> float:
    """How many times as long the rival takes: the median of the per-round ratios."""
    return statistics.median(r / o for r, o in zip(rival.seconds, ours.seconds, strict=True))
