"""Tables and pictures of `comm`, and the files they are kept in."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from pysmooth.distributed.network import Network

from .contestants import contestant
from .link import bytes_per_second
from .predict import packing, packing_alone, predicted
from .verdicts import verdicts

RANKS = (2, 8, 64, 1024, 16384)


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A link's race, a row per contestant: times, bytes, packing, the model's word."""
    race = found["race"]
    dense = race["dense"]["seconds"]
    out = []
    for name in (n for n in race if n != "alone"):
        seconds = race[name]["seconds"]
        work, alone = packing(race, name), packing_alone(race, name)
        travel = statistics.median(dense) - statistics.median(seconds)
        out.append(
            {
                "contestant": name,
                "seconds": statistics.median(seconds),
                "speedup": statistics.median(d / s for d, s in zip(dense, seconds, strict=True)),
                "sent": race[name]["sent"],
                # In this group, and in a group of one; the shares are of the time of dense
                # communication that they save.
                "packing": work,
                "packing_share": _share(work, travel),
                "packing_alone": alone,
                "packing_alone_share": _share(alone, travel),
                "predicted": predicted(found, name, found["ranks"]),
            }
        )
    return out


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _share(work: float, travel: float) -> float | None:
    return work / (travel + work) if travel + work > 0 else None


def print_race(found: dict[str, Any], console: Console) -> None:
    """One link's table."""
    title = f"{found['description']}, {found['ranks']} ranks, {found['rate']}"
    table = Table(title=title, title_justify="left")
    packing = ("packing ms", "of saved", "alone ms", "of saved")
    for column in ("", "ms / step", "x dense", "MiB sent", *packing, "model ms"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows(found):
        model = row["predicted"]
        table.add_row(
            row["contestant"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['sent'] / 2**20:.3f}",
            f"{1e3 * row['packing']:.1f}",
            _percent(row["packing_share"]),
            f"{1e3 * row['packing_alone']:.1f}",
            _percent(row["packing_alone_share"]),
            "-" if model is None else f"{1e3 * model:.1f}",
        )
    console.print(table)


def print_quality(found: dict[str, Any], console: Console) -> None:
    """The losses after the same number of steps."""
    table = Table(title=f"{found['description']}, loss after {found['steps']} steps")
    for column in ("", "learning rate", "training, last tenth", "held out", "against dense"):
        table.add_column(column, justify="left" if not column else "right")
    dense = found["quality"]["dense"]["held_out"]
    for name, row in found["quality"].items():
        tail = row["losses"][-max(1, len(row["losses"]) // 10) :]
        table.add_row(
            name,
            f"{row['lr']:g}",
            f"{statistics.mean(tail):.4f}",
            f"{row['held_out']:.4f}",
            f"{row['held_out'] / dense - 1:+.1%}",
        )
    console.print(table)


def print_thresholds(results: dict[str, Any], console: Console) -> None:
    """Steps with other `dense_below` than the default, and which is the best."""
    found = results["dense_below"]
    title = f"dense_below: a step, in multiples of one with {found['default']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "link", *map(str, found["means"])):
        table.add_column(column, justify="right" if column.isdigit() else "left")
    rows = found["rows"]
    for at in dict.fromkeys((r["workload"], r["contestant"], r["rate"]) for r in rows):
        mine = [r for r in rows if (r["workload"], r["contestant"], r["rate"]) == at]
        table.add_row(f"{at[0]}, {at[1]}", at[2], *(f"{r['ratio']:.3f}" for r in mine))
    errors = found["errors"]
    both = (f"{mean:.3f} ±{2 * errors[numel]:.1%}" for numel, mean in found["means"].items())
    table.add_row("all, ± two standard errors", "", *both)
    console.print(table)
    console.print(f"By these the default would be {found['choice']}.")


def print_verdicts(results: dict[str, Any], console: Console) -> None:
    """Whether the claims hold."""
    table = Table(title="Claims", title_justify="left")
    for column in ("", "claim", "measured", "holds"):
        table.add_column(column)
    for verdict in results["verdicts"]:
        table.add_row(
            f"{verdict['contestant']}, {verdict['where']}",
            verdict["claim"],
            verdict["measured"],
            "yes" if verdict["holds"] else "no",
        )
    console.print(table)


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """Adds rows and verdicts, writes JSON and pictures, and names them."""
    out.mkdir(parents=True, exist_ok=True)
    for found in results["races"]:
        found["rows"] = rows(found)
    results["verdicts"] = verdicts(results)
    path = out / "comm.json"
    path.write_text(json.dumps(results, indent=1))
    files = [path]
    shaped = [f for f in results["races"] if f["rate"] != "loopback"]
    for workload in dict.fromkeys(f["workload"] for f in shaped):
        mine = [f for f in shaped if f["workload"] == workload]
        files.append(_steps(mine, out / f"comm-{workload}.png"))
        files.append(_when(mine[-1], out / f"comm-{workload}-ranks.png"))
    for found in results["qualities"]:
        files.append(_losses(found, out / f"comm-{found['workload']}-losses.png"))
    return files


def _save(path: Path) -> Path:
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()
    return path


def _steps(races: list[dict[str, Any]], path: Path) -> Path:
    names = [row["contestant"] for row in races[0]["rows"]]
    _, axes = plt.subplots(
        1, len(races), figsize=(2.2 + 3 * len(races), 1 + 0.3 * len(names)), sharey=True
    )
    for axis, found in zip([axes] if len(races) == 1 else axes, races, strict=True):
        values = {row["contestant"]: row["speedup"] for row in found["rows"]}
        bars = axis.barh(names[::-1], [values[name] for name in names[::-1]], color="#2a9d6f")
        axis.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
        axis.axvline(1, color="#555555", linewidth=0.8)
        axis.set_title(found["rate"], fontsize=10)
        axis.set_xlabel("dense step / this step")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(path)


def _when(found: dict[str, Any], path: Path) -> Path:
    """By the model: this workload on more ranks and other links."""
    rates = ("100mbit", "1gbit", "10gbit", "100gbit")
    names = [n for n in found["race"] if n not in ("alone", "dense")]
    names = [n for n in names if contestant(n).scheme is not None]
    _, axes = plt.subplots(1, len(rates), figsize=(3.2 * len(rates), 3.6), sharey=True)
    for axis, rate in zip(axes, rates, strict=True):
        net = Network(bytes_per_second(rate), 50e-6)
        for name in names:
            ratios = []
            for ranks in RANKS:
                dense = predicted(found, "dense", ranks, net)
                ours = predicted(found, name, ranks, net)
                assert dense is not None
                assert ours is not None
                ratios.append(dense / ours)
            axis.plot(RANKS, ratios, marker="o", markersize=3, label=name)
        axis.axhline(1, color="#555555", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.set_title(rate, fontsize=10)
        axis.set_xlabel("ranks")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("dense step / compressed step (model)")
    axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    return _save(path)


def _losses(found: dict[str, Any], path: Path) -> Path:
    _, axis = plt.subplots(figsize=(7, 4))
    for name, row in found["quality"].items():
        losses = row["losses"]
        width = max(1, len(losses) // 20)
        means = [statistics.mean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]
        axis.plot(means, linewidth=1.2, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, running mean")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(path)
