"""The cost model, given what was measured on two ranks, against the steps measured there."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from pysmooth.distributed.cost import Workload, predict
from pysmooth.distributed.network import Network
from pysmooth.distributed.schemes import scheme

from .contestants import contestant

MEMORY = 20e9  # an arbitrary unit here: packing is given in seconds, as measured


def measured_network(rows: list[dict[str, float]], ranks: int) -> Network:
    """Latency and bandwidth, from the times of the smallest sum and of the largest."""
    small, large = rows[0]["seconds"], rows[-1]["seconds"]
    bandwidth = 2 * (ranks - 1) / ranks * rows[-1]["bytes"] / max(large - small, 1e-9)
    return Network(bandwidth, small / (2 * (ranks - 1)))


def packing_alone(race: dict[str, Any], name: str) -> float:
    """Seconds that a hook adds to a step in a group of one rank, where nothing travels.

    That rank is the server of everything, and decodes its own message alone.
    """
    pairs = zip(race[name]["solo_seconds"], race["dense"]["solo_seconds"], strict=True)
    return max(0.0, float(statistics.median(a - b for a, b in pairs)))


def packing(race: dict[str, Any], name: str) -> float:
    """Seconds that a hook's threads work in a step of the group that was measured.

    A server's share is that of this group there, and as many messages are decoded. Of other hooks
    than pysmooth's it is not known: what they add in a group of one.
    """
    if (worked := race[name].get("worked_seconds")) is None:
        return packing_alone(race, name)
    return float(statistics.median(worked))


def predicted(
    found: dict[str, Any], name: str, ranks: int, net: Network | None = None
) -> float | None:
    """Seconds of a step by the model; None for what it has no word for.

    Args:
        found: what `worker` found on one link.
        name: the contestant.
        ranks: for how many; packing is taken as measured, for messages of few ranks.
        net: another network than the measured one.
    """
    if (word := contestant(name).scheme) is None:
        return None
    race, numel = found["race"], found["numel"]
    backward = statistics.median(race["alone"]["backward_seconds"])
    other = statistics.median(race["dense"]["solo_seconds"]) - backward
    work = Workload(numel, backward, max(0.0, other), memory_bandwidth=MEMORY)
    way = scheme(word)
    seconds = packing(race, name)
    # Half to pack, half to unpack; what more ranks send has to be unpacked, too.
    each = seconds / 2 / numel * MEMORY
    grows = way.unpack(ranks) / way.unpack(found["ranks"]) if way.unpack(2) > 0 else 1.0
    way = replace(way, pack=each, unpack=lambda _: each * grows)
    return predict(work, net or measured_network(found["network"], ranks), ranks, way).total
