"""What a step of data-parallel training costs on a network, dense and compressed: a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .network import Network
from .schemes import Scheme, scheme


@dataclass(frozen=True)
class Workload:
    """What a step does beside communication.

    Args:
        numel: gradients per rank.
        backward: seconds of backward, during which communication can run.
        other: seconds of forward and optimizer, during which it can not.
        bucket_bytes: DDP's `bucket_cap_mb`, in bytes.
        memory_bandwidth: bytes per second of the memory in which gradients are packed.
        overlap: how much of the communication can hide behind backward: 1 where the network
            moves bytes by itself, less where that takes the cores that compute.
    """

    numel: int
    backward: float
    other: float = 0.0
    bucket_bytes: float = 25 * 2**20
    memory_bandwidth: float = 20e9
    overlap: float = 1.0

    def __post_init__(self) -> None:
        for name in ("numel", "bucket_bytes", "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("backward", "other"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be between 0 and 1, not {self.overlap}")


@dataclass(frozen=True)
class Step:
    """Seconds of one step and where they go."""

    total: float
    network: float  # all messages, hidden or not
    exposed: float  # waiting for the network
    packing: float  # making messages and taking them in
    sent: float  # bytes that leave a rank


def predict(work: Workload, net: Network, ranks: int, way: Scheme) -> Step:
    """One step: buckets become ready one after the other, and queue for the network."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, not {ranks}")
    buckets = max(1, round(4 * work.numel / work.bucket_bytes))
    numel = math.ceil(work.numel / buckets)
    message = way.message(numel)
    travel = way.travel(net, message, ranks)
    pack = way.pack * numel / work.memory_bandwidth
    unpack = way.unpack(ranks) * numel / work.memory_bandwidth
    computed = free = 0.0
    for _ in range(buckets):
        computed += work.backward / buckets + pack
        free = max(free, computed) + travel
    network, unpacking = buckets * travel, buckets * unpack
    hidden = max(computed + unpacking - unpack, free) + unpack
    serial = computed + network + unpacking
    end = hidden + (1 - work.overlap) * (serial - hidden)
    packing = buckets * (pack + unpack)
    return Step(
        work.other + end,
        network,
        max(0.0, end - work.backward - packing),
        packing,
        buckets * message * way.sent(ranks),
    )


@dataclass(frozen=True)
class Answer:
    """What `will_it_help` found: a step as it is, and with compression.

    Attributes:
        method: what is sent.
        ranks: how many processes.
        dense: seconds and bytes of a step with dense sums.
        compressed: of one with compressed messages.
    """

    method: str
    ranks: int
    dense: Step
    compressed: Step

    @property
    def speedup(self) -> float:
        """Time of a dense step over that of a compressed one."""
        return self.dense.total / self.compressed.total

    @property
    def helps(self) -> bool:
        """Whether a step becomes at least 5 % faster; less does not pay for a change of numbers."""
        return self.speedup >= 1.05

    def __str__(self) -> str:
        waits = self.dense.exposed / self.dense.total
        grown = self.compressed.network > self.dense.network
        reason = (
            f"a dense step waits for the network {waits:.0%} of its time"
            if not grown
            else "the compressed messages of so many ranks take longer than the dense sum"
        )
        return (
            f"{self.method} on {self.ranks} ranks: {'helps' if self.helps else 'does not help'}, "
            f"{self.speedup:.2f}x per step ({1e3 * self.dense.total:.4g} ms dense, "
            f"{1e3 * self.compressed.total:.4g} ms compressed; {self.dense.sent / 2**20:.3g} MiB "
            f"and {self.compressed.sent / 2**20:.3g} MiB sent per rank): {reason}"
        )


def will_it_help(
    numel: int,
    ranks: int,
    *,
    bandwidth: float,
    backward: float,
    method: str = "sign-ef",
    latency: float = 50e-6,
    other: float = 0.0,
    ratio: float = 0.01,
    levels: int = 15,
    bucket_bytes: float = 25 * 2**20,
    memory_bandwidth: float = 20e9,
    overlap: float = 1.0,
) -> Answer:
    """Whether compressing the gradients of a data-parallel training makes its steps shorter.

    A model, not a measurement: ring or tree collectives at `latency + bytes / bandwidth`, buckets
    that wait for backward and for each other, packing at the speed of memory. It says nothing about
    the number of steps: a training with compressed gradients may need more of them.

    Args:
        numel: parameters.
        ranks: processes that average their gradients.
        bandwidth: bytes per second of one rank's link, each way (1 Gbit/s: 125e6).
        backward: seconds of one backward without communication.
        method: one of "bf16", "sign", "sign-ef" (two phases, error feedback on workers and
            servers), "topk", "randk", "natural", "qsgd".
        latency: seconds per message.
        other: seconds of forward and optimizer.
        ratio: of coordinates kept by "topk" and "randk".
        levels: of "qsgd".
        bucket_bytes: DDP's bucket size.
        memory_bandwidth: bytes per second at which gradients are packed.
        overlap: how much of the communication can hide behind backward, 0 to 1.

    Raises:
        ValueError: for numbers that no machine has, and an unknown method.

    Example:
        >>> print(will_it_help(124_000_000, 8, bandwidth=125e6, backward=0.3))
        sign-ef on 8 ranks: helps, ...
    """
    net = Network(bandwidth, latency)
    work = Workload(numel, backward, other, bucket_bytes, memory_bandwidth, overlap)
    way = scheme(method, ratio=ratio, levels=levels)
    return Answer(
        method, ranks, predict(work, net, ranks, scheme("dense")), predict(work, net, ranks, way)
    )
