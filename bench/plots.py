"""The report's pictures."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from .suite import claims

COLORS = {
    "torch for-loop": "#b8c4d6",
    "torch foreach": "#8fa3c0",
    "torch fused": "#4a6fa5",
    "torch.compile": "#c8713b",
    "eager": "#d9d2c5",
    "eager in place": "#b5a68d",
    "DeepSpeed CPU": "#7d5ba6",
    "bitsandbytes": "#a06c9c",
    "bitsandbytes 8-bit": "#c9a3c6",
    "heavyball": "#b0576b",
    "optimi": "#cf8a97",
    "pytorch_optimizer": "#8a7f5c",
}
OURS = "#2a9d6f"
LINES: tuple[Literal["-", ":", "--", "-."], ...] = ("-", ":", "--", "-.")


def write_plots(results: dict[str, Any], out_dir: Path) -> list[Path]:
    """Writes the pictures for which there is data."""
    written = []
    for name, figure in figures(results).items():
        written.append(out_dir / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """The pictures for which there is data, by name."""
    found: dict[str, Figure] = {}
    rows = [row for row in results["rows"] if claims(row)]
    if rows:
        found["speedups"] = _speedups(rows)
    bounded = [row for row in rows if row["roofline_fraction"] is not None]
    if bounded:
        found["roofline"] = _roofline(bounded)
    if results["numerics"]:
        found["numerics"] = _numerics(results["numerics"])
    if results["end_to_end"]:
        found["losses"] = _losses(results["end_to_end"])
    if results["scaling"]:
        found["scaling"] = _scaling(results["scaling"])
    for figure in found.values():
        figure.tight_layout()
        plt.close(figure)  # pyplot need not keep it
    return found


def _clean(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _speedups(rows: list[dict[str, Any]]) -> Figure:
    height = 1.3 + sum(0.2 * len(row["contestants"]) + 0.05 for row in rows)
    figure, axis = plt.subplots(figsize=(9, height))
    ticks, labels = [], []
    at = 0.0
    for row in reversed(rows):
        bars = [c for c in row["contestants"] if c["name"] != "pysmooth"]
        for c in reversed(bars):
            axis.barh(at, c["ratio"], 0.9, color=COLORS.get(c["name"], "#999999"))
            axis.text(c["ratio"] * 1.03, at, f"{c['ratio']:.2g}x", va="center", fontsize=8)
            at += 1
        ticks.append(at - (len(bars) + 1) / 2)
        labels.append(f"{row['method']}\n{row['model']}")
        at += 0.7
    axis.axvline(1, color=OURS, linewidth=1.5)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("rival's time / pysmooth's time (log scale; the green line is pysmooth)")
    names = [n for n in COLORS if any(c["name"] == n for r in rows for c in r["contestants"])]
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[n]) for n in names]
    axis.legend(
        handles,
        names,
        fontsize=8,
        frameon=False,
        ncols=min(len(names), 5),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    axis.margins(y=0.01)
    _clean(axis)
    return figure


def _roofline(rows: list[dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.45 * len(rows)))
    names = [f"{row['method']}, {row['model']}" for row in reversed(rows)]
    values = [row["roofline_fraction"] for row in reversed(rows)]
    axis.barh(names, values, 0.6, color=OURS)
    for i, value in enumerate(values):
        axis.text(value - 0.01, i, f"{value:.2f}", va="center", ha="right", color="white")
    axis.axvline(0.9, color="#888888", linestyle="--", linewidth=1)
    axis.axvline(1.0, color="#333333", linewidth=1)
    axis.set_xlabel("fraction of the bandwidth floor measured in the same rounds")
    _clean(axis)
    return figure


def _numerics(rows: list[dict[str, Any]]) -> Figure:
    last = max(row["steps"] for row in rows)
    # Nothing to see of an error of 0.
    rows = [r for r in reversed(rows) if r["steps"] == last and r["pysmooth_relative_error"] > 0]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)))
    names = [row["method"] for row in rows]
    theirs = [row["rival_relative_error"] for row in rows]
    axis.plot(theirs, names, "o", color="#4a6fa5", markersize=9, alpha=0.5, label="rival")
    ours = [row["pysmooth_relative_error"] for row in rows]
    axis.plot(ours, names, "o", color=OURS, markersize=5, label="pysmooth")
    axis.set_xscale("log")
    axis.set_xlabel(f"distance from a float64 run after {last} steps, relative")
    axis.legend(frameon=False, fontsize=8)
    _clean(axis)
    return figure


def _losses(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(1, len(rows), figsize=(5 * len(rows), 3.4), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        axis.plot(_smooth(row["losses_torch"]), color="#4a6fa5", linewidth=4, alpha=0.5)
        axis.plot(_smooth(row["losses_pysmooth"]), color=OURS, linewidth=1.2)
        axis.legend(["torch SGD + clip", "pysmooth.ClipSGD"], frameon=False, fontsize=8)
        axis.set_title(row["name"], fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("loss, mean of 10 steps")
        _clean(axis)
    return figure


def _scaling(series: dict[str, list[dict[str, Any]]]) -> Figure:
    """Cost per unit over units, both logarithmic: a flat line is a cost in proportion."""
    units = {
        "parameters": ("ns per parameter", 1e9, True),
        "tensors": ("us per tensor of 64, fresh gradients", 1e6, True),
        "threads": ("ms, ResNet-50", 1e3, False),
    }
    chosen = [name for name in units if series.get(name)]
    everything = [p for name in chosen for p in series[name]]
    lines = dict(zip(dict.fromkeys(p["method"] for p in everything), cycle(LINES)))
    figure, axes = plt.subplots(1, len(chosen), figsize=(4.2 * len(chosen), 3.8), squeeze=False)
    for axis, name in zip(axes[0], chosen, strict=True):
        label, scale, per_unit = units[name]
        points = series[name]
        for method, line in lines.items():
            own = [p for p in points if p["method"] == method]
            for contestant in own[0]["seconds"] if own else ():
                y = [scale * p["seconds"][contestant] / (p["x"] if per_unit else 1) for p in own]
                color = OURS if contestant == "pysmooth" else COLORS.get(contestant, "#999999")
                axis.plot([p["x"] for p in own], y, linestyle=line, marker=".", color=color)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_title(label, fontsize=9)
        _clean(axis)
        # Threads come in powers of two, and minor ticks would be labelled over one another.
        if name == "threads":
            axis.set_xticks(sorted({p["x"] for p in points}), minor=False)
            axis.set_xticks([], minor=True)
            axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    keys = [
        Line2D([], [], color=OURS if n == "pysmooth" else COLORS.get(n, "#999999"), label=n)
        for n in dict.fromkeys(n for p in everything for n in p["seconds"])
    ] + [
        Line2D([], [], color="#888888", linestyle=line, label=method)
        for method, line in lines.items()
    ]
    axes[0][0].legend(
        handles=keys,
        frameon=False,
        fontsize=8,
        ncols=6,
        loc="lower left",
        bbox_to_anchor=(0, 1.08),
    )
    return figure


def _smooth(losses: list[float], width: int = 10) -> list[float]:
    return [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
