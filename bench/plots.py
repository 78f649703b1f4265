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
from matplotlib.ticker import NullFormatter

from .suite import claims

COLORS = {
    "torch for-loop": "#b8c4d6",
    "torch foreach": "#8fa3c0",
    "torch fused": "#4a6fa5",
    "torch.compile": "#c8713b",
    "eager": "#c4ab74",
    "eager in place": "#8f7440",
    "DeepSpeed CPU": "#7d5ba6",
    "bitsandbytes": "#a06c9c",
    "bitsandbytes 8-bit": "#c9a3c6",
    "flashoptim plain": "#6f9e57",
    "heavyball": "#b0576b",
    "optimi": "#cf8a97",
    "pytorch_optimizer": "#4f9aa3",
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
        plt.close(figure)  # pyplot need not keep it
    return found


def _clean(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _speedups(rows: list[dict[str, Any]]) -> Figure:
    """A column per model, a line per method, a dot per rival; the bars are the middle halves."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    size = (2.2 + 3.1 * len(models), 1.3 + 0.29 * len(methods))
    figure, axes = plt.subplots(
        1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        for row in (r for r in rows if r["model"] == model):
            at = methods.index(row["method"])
            for c in (c for c in row["contestants"] if not c["name"].startswith("pysmooth")):
                color = COLORS.get(c["name"], "#999999")
                axis.plot([c.get("ratio_low"), c.get("ratio_high")], [at, at], color=color)
                axis.plot(c["ratio"], at, "o", color=color, markersize=6, alpha=0.9)
        axis.axvline(1, color=OURS, linewidth=2)
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.grid(axis="y", color="#888888", alpha=0.2, linewidth=0.6)
        axis.tick_params(axis="y", length=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(model, fontsize=10)
        axis.margins(y=0.5 / len(methods))
        _clean(axis)
    figure.supxlabel("rival's time / pysmooth's (green: pysmooth)", fontsize=9)
    _legend(figure, {c["name"] for r in rows for c in r["contestants"]}, max(3, 2 * len(models)))
    return figure


def _legend(figure: Figure, there: set[str], columns: int) -> None:
    """The rivals' colours, in a line or two on top."""
    names = [n for n in COLORS if n in there]
    dots = [Line2D([], [], color=COLORS[n], marker="o", linestyle="") for n in names]
    figure.legend(
        dots,
        names,
        fontsize=8,
        frameon=False,
        ncols=min(len(names), columns),
        loc="outside upper center",
    )


def _roofline(rows: list[dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.45 * len(rows)), layout="constrained")
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
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
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
    figure, axes = plt.subplots(
        1, len(rows), figsize=(5 * len(rows), 3.4), squeeze=False, layout="constrained"
    )
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
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(4.2 * len(chosen), 3.8), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], chosen, strict=True):
        label, scale, per_unit = units[name]
        points = series[name]
        for method, line in lines.items():
            own = [p for p in points if p["method"] == method]
            for contestant in own[0]["seconds"] if own else ():
                # The largest size may be too large for some.
                ran = [p for p in own if contestant in p["seconds"]]
                y = [scale * p["seconds"][contestant] / (p["x"] if per_unit else 1) for p in ran]
                color = OURS if contestant == "pysmooth" else COLORS.get(contestant, "#999999")
                axis.plot([p["x"] for p in ran], y, linestyle=line, marker=".", color=color)
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
    figure.legend(handles=keys, frameon=False, fontsize=8, ncols=6, loc="outside upper center")
    return figure


def _smooth(losses: list[float], width: int = 10) -> list[float]:
    return [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
