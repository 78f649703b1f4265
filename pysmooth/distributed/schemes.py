"""Ways to average gradients, as the cost model sees them: bytes made, moved and sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .network import Network


@dataclass(frozen=True)
class Scheme:
    """A way to average gradients.

    Args:
        message: bytes that a rank makes of `numel` gradients.
        travel: seconds on the network for such a message, given the ranks.
        sent: bytes that leave a rank, in multiples of the message, given the ranks.
        pack: bytes of memory moved per gradient to make the message.
        unpack: the same to take the messages of so many ranks in.
    """

    message: Callable[[int], float]
    travel: Callable[[Network, float, int], float]
    sent: Callable[[int], float]
    pack: float = 0.0
    unpack: Callable[[int], float] = lambda ranks: 0.0


def _reduced(bytes_each: float, moved: float = 0.0) -> Scheme:
    return Scheme(
        lambda n: bytes_each * n,
        Network.all_reduce,
        lambda ranks: 2 * (ranks - 1) / ranks,
        moved,
        lambda ranks: moved,
    )


def _gathered(message: Callable[[int], float], pack: float, read: float) -> Scheme:
    """Everybody decodes everybody's message; `read`: bytes moved per gradient and message."""
    return Scheme(
        message, Network.all_gather, lambda ranks: ranks - 1, pack, lambda ranks: 4 + ranks * read
    )


def _two_phases() -> Scheme:
    """Shares of the packed signs go to their servers, and what those make of them to all."""
    return Scheme(
        lambda n: n / 8 + 4,
        lambda net, size, ranks: net.all_to_all(size, ranks) + net.all_gather(size / ranks, ranks),
        lambda ranks: 2 * (ranks - 1) / ranks,
        12 + 1 / 8,
        lambda ranks: 12 + 4 + 3 / 8,
    )


def index_bytes(numel: int, k: int) -> int:
    """Bytes that tell which k of `numel` values are sent: packed indices, or a bitmap if shorter.

    `ceil(min(k * ceil(log2(numel)), numel) / 8)`.
    """
    return -(-min(k * (numel - 1).bit_length(), numel) // 8)


def sparse_bytes(numel: int, k: int, *, value_bytes: int = 4) -> int:
    """Bytes of k of `numel` values and their places."""
    return index_bytes(numel, k) + value_bytes * k


def scheme(method: str, *, ratio: float = 0.01, levels: int = 15) -> Scheme:
    """The scheme called `method`, one of `METHODS`.

    Args:
        method: its name.
        ratio: of the coordinates that "topk" and "randk" keep.
        levels: of "qsgd".
    """
    bits = 1 + math.ceil(math.log2(levels + 1))

    def kept(n: int) -> int:
        return max(1, math.ceil(ratio * n))

    table: dict[str, Callable[[], Scheme]] = {
        "dense": lambda: _reduced(4),
        "bf16": lambda: _reduced(2, 6),
        "sign": lambda: _gathered(lambda n: n / 8 + 4, 4, 1 / 8),
        "sign-ef": _two_phases,
        # e += g; the sampled filter reads v again where candidates lie.
        "topk": lambda: _gathered(lambda n: sparse_bytes(n, kept(n)), 12, 16 * ratio),
        "randk": lambda: _gathered(lambda n: 4 * kept(n), 8 * ratio, 16 * ratio),
        "natural": lambda: _gathered(lambda n: 9 * n / 8, 4 + 9 / 8, 9 / 8),
        "qsgd": lambda: _gathered(lambda n: 4 + bits * n / 8, 8 + bits / 8, bits / 8),
    }
    if method not in table:
        raise ValueError(f"method must be one of {', '.join(table)}, not {method!r}")
    return table[method]()


METHODS = ("dense", "bf16", "sign", "sign-ef", "topk", "randk", "natural", "qsgd")
