"""Figures: medians and bands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .registry import need

COLORS = ("#2a9d6f", "#c8713b", "#4a6fa5", "#8d5a97", "#b5a68d", "#b0413e", "#5f6b6d", "#d1a93b")


def draw(result: dict[str, Any], path: Path) -> Path:
    """One experiment's figure, from its JSON."""
    need("matplotlib").use("Agg")
    plt: Any = need("matplotlib.pyplot")
    panels = result["panels"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _panel(axis: Any, panel: dict[str, Any]) -> None:
    for i, curve in enumerate(panel["curves"]):
        color = COLORS[i % len(COLORS)]
        low, middle, high = ([_finite(v) for v in row] for row in curve["quantiles"])
        marker = "o" if len(curve["x"]) < 15 else None
        style = "-" if i < len(COLORS) else "--"
        axis.plot(
            curve["x"], middle, style, color=color, label=curve["label"], lw=1.5, marker=marker
        )
        axis.fill_between(curve["x"], low, high, color=color, alpha=0.18, lw=0)
    axis.set_title(panel["title"], fontsize=10)
    axis.set_xlabel(panel["xlabel"])
    axis.set_ylabel(panel["ylabel"])
    if panel["xlog"]:
        axis.set_xscale("symlog" if min(c["x"][0] for c in panel["curves"]) <= 0 else "log")
    if panel["ylog"] and any(v and v > 0 for c in panel["curves"] for v in c["quantiles"][1]):
        axis.set_yscale("log")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=7, frameon=False)


def _finite(value: float | None) -> float:
    return math.nan if value is None or abs(value) > 1e40 else value
