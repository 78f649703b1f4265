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
# A gain that is no reason for another default, were it certain.
SMALL = 0.02


def thresholds(results: dict[str, Any], numels: list[int]) -> dict[str, Any]:
    """Times of steps against those with the default, and the limit that they choose.

    Contestants take turns, so a round's steps stand beside each other: `ratio` is the median over
    rounds. The choice has the least geometric mean over links and methods (`means`); the default
    stays unless that is more than 2 % below 1 by two of its standard errors, which come of how far
    rounds lie apart (`errors`, of logarithms).
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
                logs = [math.log(a / b) for a, b in pairs]
                rows.append(
                    {
                        **{key: found[key] for key in ("workload", "ranks", "rate")},
                        "contestant": name,
                        "dense_below": numel,
                        "seconds": statistics.median(row["seconds"]),
                        "ratio": math.exp(statistics.median(logs)),
                        "error": statistics.stdev(logs) / math.sqrt(len(logs)),
                    }
                )
    means, errors = {}, {}
    for numel in numels:
        mine = [row for row in rows if row["dense_below"] == numel]
        if mine:
            means[numel] = math.exp(statistics.mean(math.log(row["ratio"]) for row in mine))
            errors[numel] = math.hypot(*(row["error"] for row in mine)) / len(mine)
    choice = min(means, key=lambda numel: means[numel], default=DEFAULT)
    if not means or means[choice] * math.exp(2 * errors[choice]) >= 1 - SMALL:
        choice = DEFAULT
    return {"default": DEFAULT, "choice": choice, "means": means, "errors": errors, "rows": rows}
