"""The latency-bandwidth model of collectives (Thakur, Rabenseifner, Gropp 2005).

A message of n bytes takes `latency + n / bandwidth`; every rank sends and receives at the same
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A rank's link, as a latency and a bandwidth.

    Args:
        bandwidth: bytes per second, each way.
        latency: seconds until the first byte of a message arrives.

    Raises:
        ValueError: an argument is out of range.
    """

    bandwidth: float
    latency: float = 50e-6

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ValueError(
                f"bandwidth must be positive and latency not negative, not {self.bandwidth} "
                f"and {self.latency}"
            )

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds for the sum of `size` bytes: a ring or a pipelined tree, whichever is faster."""
        if ranks == 1:
            return 0.0
        ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
        tree = 2 * math.ceil(math.log2(ranks)) * self.latency + 2 * size / self.bandwidth
        return min(ring, tree)

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until everybody has everybody's `size` bytes: what grows with the ranks."""
        if ranks == 1:
            return 0.0
        return math.ceil(math.log2(ranks)) * self.latency + (ranks - 1) * size / self.bandwidth

    def all_to_all(self, size: float, ranks: int) -> float:
        """Seconds until everybody has its share of everybody's `size` bytes."""
        return (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
