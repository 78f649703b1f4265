"""The communication benchmark: its networks come and go, its ranks meet, its figures add up."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
from pysmooth.bench.comm.launch import launch
from pysmooth.bench.comm.link import Link, LinkUnavailableError, bytes_per_second
from pysmooth.bench.comm.predict import measured_network
from pysmooth.bench.comm.report import rows, write
from pysmooth.bench.comm.worker import Task


def test_rates() -> None:
    assert bytes_per_second("100mbit") == 12.5e6
    assert bytes_per_second("2.5gbit") == 312.5e6
    for bad in ("", "1", "gbit", "1 gbit", "-1gbit", "1tbit"):
        with pytest.raises(ValueError, match="rate"):
            bytes_per_second(bad)


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_a_link_is_there_and_gone() -> None:
    link = Link(2, "1gbit")
    try:
        link.open()
    except LinkUnavailableError as error:
        pytest.skip(f"no network can be made here: {error}")
    with contextlib.suppress(KeyError), contextlib.closing(link):
        assert all(link.host(rank) in _namespaces() for rank in range(3))
        shape = subprocess.run(
            [*link.inside(1), "tc", "qdisc", "show", "dev", link.interface],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "tbf" in shape.stdout
        assert "1Gbit" in shape.stdout
        raise KeyError("as a benchmark might")
    assert link.host(0) not in _namespaces()


def test_latency_and_bandwidth_come_back() -> None:
    times = [{"bytes": 4.0, "seconds": 2e-4}, {"bytes": 1e8, "seconds": 2e-4 + 0.8}]
    net = measured_network(times, 2)
    assert net.latency == pytest.approx(1e-4)
    assert net.bandwidth == pytest.approx(1.25e8)


def test_a_race_and_a_training(tmp_path: Path) -> None:
    names = ["dense", "torch fp16", "sign, both ways, EF"]
    found = launch(Task("wide", names, 3, "", 4, ""), ranks=2, rate=None)
    numel = found["numel"]
    known = {"workload": "wide", "ranks": 2, "description": "wide", "rate": "loopback", "steps": 4}
    found |= known
    by_name = {row["contestant"]: row for row in rows(found)}
    # What a ring of two sends is what there is; the headers of packets come on top.
    assert 4 * numel <= by_name["dense"]["sent"] < 4.3 * numel
    assert 2 * numel <= by_name["torch fp16"]["sent"] < 2.3 * numel
    assert by_name["dense"]["predicted"] > 0
    assert by_name["dense"]["speedup"] == 1
    # The threads of a hook work no longer than a step takes; of torch's it is not known.
    signs = found["race"]["sign, both ways, EF"]
    assert all(w > 0 for w in signs["worked_seconds"])
    assert 0 < by_name["sign, both ways, EF"]["packing"] < by_name["sign, both ways, EF"]["seconds"]
    assert by_name["torch fp16"]["packing"] == by_name["torch fp16"]["packing_alone"]
    quality = found["quality"]
    assert len(quality["dense"]["losses"]) == 4
    assert quality["torch fp16"]["held_out"] == pytest.approx(
        quality["dense"]["held_out"], rel=1e-3
    )
    files = write({"races": [found], "qualities": [found]}, tmp_path)
    assert all(path.stat().st_size > 0 for path in files)


def test_a_rank_that_fails_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 failed.*KeyError: 'no such hook'"):
        launch(Task("wide", ["no such hook"], 3, "", 0, ""), ranks=2, rate=None)
