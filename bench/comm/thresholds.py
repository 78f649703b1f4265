"""Which `dense_below` makes the fastest steps, given races with several."""

from __future__ import annotations

import inspect
import math
import statistics
from typing import Any

from pysmooth.distributed import CompressedState

from .contestants import with_dense_below
from .verdicts import CLAIMED

DEFAULT = int(inspect.signature(CompressedState).parameters["dense_below"].default)
# A gain that is no reason for another default: steps of one method differ by more between runs.
NOISE = 0.02


def thresholds(results: dict[str, Any], numels: list[int]) -> dict[str, Any]:
    """Times of steps against those with the default, and the limit that they choose.

    Contestants take turns, so a round's steps stand beside each other: `ratio` is the median over
    rounds. The choice has the least geometric mean over links and methods; the default stays where
    that is within 2 % of it.
    """
    rows = []
    for found in results["races"]:
        for name in CLAIMED:
            base = found["race"].get(name)
            for numel in numels:
                row = found["race"].get(with_dense_below(name, numel))
                if base is None or row is None:
                    continue
                pairs = zip(row["seconds"], base["seconds"], strict=True)
                rows.append(
                    {
                        **{key: found[key] for key in ("workload", "ranks", "rate")},
                        "contestant": name,
                        "dense_below": numel,
                        "seconds": statistics.median(row["seconds"]),
                        "ratio": statistics.median(a / b for a, b in pairs),
                    }
                )
    means = {}
    for numel in numels:
        ratios = [row["ratio"] for row in rows if row["dense_below"] == numel]
        if ratios:
            means[numel] = math.exp(statistics.mean(math.log(r) for r in ratios))
    best = min(means, key=lambda numel: means[numel], default=DEFAULT)
    choice = best if means.get(best, 1.0) < 1 - NOISE else DEFAULT
    return {"default": DEFAULT, "choice": choice, "means": means, "rows": rows}
