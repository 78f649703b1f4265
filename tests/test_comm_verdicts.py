"""Claims about compressed communication are decided by the figures that stand beside them."""

from __future__ import annotations

from typing import Any

import pytest
from pysmooth.bench.comm.contestants import contestant, with_dense_below
from pysmooth.bench.comm.verdicts import verdicts


def _results(speedup: float, share: float | None, held_out: float) -> dict[str, Any]:
    row = {"contestant": "EF14 top-1 %", "speedup": speedup, "packing_share": share}
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
    assert "at lr 0.25" in found[-1]["measured"]
    assert "at lr 0.5" in found[-1]["measured"]


def test_thresholds_are_contestants() -> None:
    name = with_dense_below("EF14 top-1 %", 256)
    assert contestant(name).method == contestant("EF14 top-1 %").method
    with pytest.raises(KeyError, match="no dense_below"):
        contestant(with_dense_below("torch fp16", 256))
