"""JSON of an experiment, and the page of all."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pysmooth

from .outcome import Check, Config, Experiment, Outcome

HEAD = """# The papers' claims, measured

Written by `python -m pysmooth.bench papers --docs docs` (`make papers`), not by hand. Every
experiment runs pysmooth's own optimizers and hooks, many runs in one loop. Bands: 10 % to 90 % of
the runs; lines: medians. A claim's basis is the paper itself, memory of it ("recalled"), or a
derivation ("derived": from formulas, or from a simulation made beforehand). What does not hold is
reported as it is. To add an experiment: `bench/papers/__init__.py`.
"""


def as_json(
    experiment: Experiment, config: Config, outcome: Outcome, seconds: float
) -> dict[str, Any]:
    """All there is to know of a run: numbers that are not finite are null."""
    panels = [
        {
            "title": panel.title,
            "xlabel": panel.xlabel,
            "ylabel": panel.ylabel,
            "xlog": panel.xlog,
            "ylog": panel.ylog,
            "curves": [
                {
                    "label": curve.label,
                    "x": curve.x,
                    "runs": len(curve.values),
                    "quantiles": [[_number(v) for v in row] for row in curve.quantiles()],
                }
                for curve in panel.curves
            ],
        }
        for panel in outcome.panels
    ]
    return {
        "id": experiment.id,
        "title": experiment.title,
        "papers": list(experiment.papers),
        "setting": experiment.setting,
        "notes": outcome.notes,
        "quick": config.quick,
        "pysmooth": pysmooth.__version__,
        "torch": torch.__version__.split("+")[0],
        "seconds": round(seconds, 1),
        "checks": [asdict(check) for check in outcome.checks],
        "panels": panels,
    }


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def write_json(result: dict[str, Any], folder: Path) -> Path:
    """ID.json."""
    path = folder / f"{result['id']}.json"
    path.write_text(json.dumps(result, allow_nan=False) + "\n")
    return path


def read_all(folder: Path) -> list[dict[str, Any]]:
    """What complete runs have left there, by id."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in results if not result["quick"]]


def page(results: list[dict[str, Any]]) -> str:
    """The page, with a table of all verdicts and a section per experiment."""
    out = [HEAD]
    holding = sum(check["holds"] for result in results for check in result["checks"])
    total = sum(len(result["checks"]) for result in results)
    out.append(f"{holding} of {total} claims hold.\n")
    out.append("| experiment | paper | claims that hold |\n|---|---|---|")
    for result in results:
        held = sum(check["holds"] for check in result["checks"])
        name = f"[{result['id']}](#{result['id']}): {result['title']}"
        out.append(f"| {name} | {_papers(result)} | {held} of {len(result['checks'])} |")
    for result in results:
        out.append(f"\n## {result['id']}\n\n**{result['title']}** ({_papers(result)})\n")
        out.append(f"{result['setting']}\n")
        out.append(f"![{result['title']}](papers/{result['id']}.png)\n")
        out.append("| claim | basis | measured | expected | verdict |\n|---|---|---|---|---|")
        for raw in result["checks"]:
            check = Check(**raw)
            verdict = "holds" if check.holds else "**does not hold**"
            if check.why and not check.holds:
                verdict += f": {check.why}"
            cells = (check.claim, check.basis, check.measured, check.expected, verdict)
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if result["notes"]:
            out.append(f"\n{result['notes']}")
    return "\n".join(out) + "\n"


def _papers(result: dict[str, Any]) -> str:
    return ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in result["papers"])
