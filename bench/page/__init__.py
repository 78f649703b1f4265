"""The report as one HTML page that needs nothing beside it: no network, no other file."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..report import ulp
from ..scaling import flatness
from ..suite import claims
from .charts import charts
from .merge import OF_A_RUN, busy, own_run, runs_of

HERE = Path(__file__).resolve().parent


def best_rivals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every row that may claim something: the fastest rival, and its time over pysmooth's."""
    found = []
    for row in rows:
        others = [c for c in row["contestants"] if not c["name"].startswith("pysmooth")]
        if claims(row) and others:
            best = min(others, key=lambda c: float(c["ratio"]))
            found.append({**row, "best": best})
    return found


def write_page(results: dict[str, Any], out_dir: Path) -> Path:
    """Writes report.html; the results themselves can be saved from it."""
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,  # a figure that is missing must not look like a blank
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = results.get("runs") or [own_run(results, "this one")]
    data = base64.b64encode(json.dumps(results).encode()).decode()
    text = environment.get_template("page.html").render(
        r=results,
        best=best_rivals(results["rows"]),
        disturbed=[run["name"] for run in runs if busy(run)],
        charts=charts(results),
        claims=claims,
        data=data,
        environment={k: v for k, v in results["environment"].items() if k not in OF_A_RUN},
        flatness=flatness,
        log=math.log,
        runs=runs,
        runs_of=runs_of,
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        ulp=ulp,
    )
    path = out_dir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path
