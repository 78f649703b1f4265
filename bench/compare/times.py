"""Times of two revisions' steps: processes take turns, and each round gives a ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .process import Worker

TURN = 0.01  # seconds, about, that a worker steps before the other has its turn


def measure(
    base: Path, head: Path, cases: list[str], rounds: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """By case: head's time over base's, the median of the rounds and the quartiles."""
    found: dict[str, dict[str, Any]] = {}
    with Worker(base) as a, Worker(head) as b:
        for case in cases:
            say(f"times: {case}")
            answers = [w.ask(f"open {case}") for w in (a, b)]
            missing = [x for x in answers if x != "ok"]
            if missing:
                found[case] = {"missing": missing[0]}
                continue
            once = float(a.ask("run 10")) / 10
            steps = max(1, round(TURN / once))
            ratios = []
            for turn in range(rounds):
                order = (a, b) if turn % 2 else (b, a)
                seconds = {w: float(w.ask(f"run {steps}")) for w in order}
                ratios.append(seconds[b] / seconds[a])
            low, middle, high = statistics.quantiles(ratios, n=4)
            found[case] = {"ratio": middle, "low": low, "high": high}
            for w in (a, b):
                w.ask("close")
    return found
