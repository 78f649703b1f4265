"""Claims about compressed communication are decided by the figures that stand beside them."""

from __future__ import annotations

from typing import Any

import pytest
from pysmooth.bench.comm.contestants import contestant, with_dense_below
from pysmooth.bench.comm.thresholds import DEFAULT, thresholds
from pysmooth.bench.comm.verdicts import CLAIMED, verdicts


def _results(speedup: float, share: float | None, held_out: float) -> dict[str, Any]:
    row = {"contestant": "EF14 top-1 %", "speedup": speedup, "packing_share": share}
    row["packing_alone_share"] = 0.104
    about = {"description": "wide", "ranks": 2}
    races = [{**about, "rate": rate, "rows": [row]} for rate in ("1gbit", "10gbit")]
    quality = {
        "dense": {"lr": 0.5, "held_out": 1.0},
        "EF14 top-1 %": {"lr": 0.25, "held_out": held_out},
    }
    return {"races": races, "qualities": [{**about, "steps": 9, "quality": quality}]}


@pytest.mark.parametrize(
    ("measured", "holds"),
    [
        ((3.0, 0.1, 1.0199), [True, True, True]),
        ((2.99, 0.101, 1.021), [False, False, False]),
        ((5.0, None, 0.9), [True, False, True]),
    ],
)
def test_verdicts(measured: tuple[float, float | None, float], holds: list[bool]) -> None:
    found = verdicts(_results(*measured))
    assert [verdict["holds"] for verdict in found] == holds
    assert "in a group of one rank 10.4%" in found[1]["measured"]
    assert "at lr 0.25" in found[-1]["measured"]
    assert "at lr 0.5" in found[-1]["measured"]


def test_thresholds_are_contestants() -> None:
    name = with_dense_below("EF14 top-1 %", 256)
    assert contestant(name).method == contestant("EF14 top-1 %").method
    with pytest.raises(KeyError, match="no dense_below"):
        contestant(with_dense_below("torch fp16", 256))


def test_a_threshold_is_chosen_by_its_steps() -> None:
    about = {"workload": "wide", "ranks": 2, "rate": "1gbit"}
    race = {}
    for name, base in zip(CLAIMED, (1.0, 2.0), strict=True):
        race[name] = {"seconds": [base, 2 * base, base]}  # a slow round is slow for all
        for numel, ratio in ((0, 1.3), (4096, 0.9), (16384, 0.95)):
            seconds = [ratio * base, 2 * ratio * base, ratio * base]
            race[with_dense_below(name, numel)] = {"seconds": seconds}
    results = {"races": [{**about, "race": race}]}
    found = thresholds(results, [0, 4096, 16384])
    assert found["choice"] == 4096
    assert found["means"] == pytest.approx({0: 1.3, 4096: 0.9, 16384: 0.95})
    assert thresholds(results, [0])["choice"] == DEFAULT == found["default"]
    for name in CLAIMED:  # rounds that contradict each other
        base = race[name]["seconds"]
        race[with_dense_below(name, 0)] = {"seconds": [0.5 * base[0], 0.9 * base[1], 1.8 * base[2]]}
    found = thresholds(results, [0])
    assert found["means"] == pytest.approx({0: 0.9})
    assert found["choice"] == DEFAULT
    for name in CLAIMED:  # too little to count
        race[with_dense_below(name, 0)] = {"seconds": [0.99 * s for s in race[name]["seconds"]]}
    assert thresholds(results, [0])["choice"] == DEFAULT
