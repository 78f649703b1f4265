"""Results of several runs as one, each figure with the run that it is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..suite import empty_results

# What identifies an element of each part. What was measured again replaces what was there; the
# contestants of an element, which are what ratios are made of, are always of one run.
KEYS = {
    "end_to_end": ("name",),
    "rows": ("method", "model", "dtype"),
    "first_step": ("method", "model"),
    "host": ("model",),
    "numerics": ("method",),
    "agreement": ("method",),
    "memory": ("method", "model"),
    "selection": ("gradients",),
}
# Of the environment, what each run has for itself.
OF_A_RUN = ("date", "commit", "load", "seconds")


def merged(files: list[Path]) -> dict[str, Any]:
    """The results in these files; of what was measured twice, the last file's count."""
    found = {**empty_results("cpu"), "environment": {}, "runs": []}
    environments = []
    for file in files:
        try:
            one = json.loads(file.read_text())
            environments.append(one["environment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"{file}: {error!r}", param_hint="FILES") from None
        _add(found, one, file.parent.name if file.stem == "results" else file.stem)
    for key in dict.fromkeys(key for e in environments for key in e):
        values = dict.fromkeys(str(e[key]) for e in environments if key in e)
        found["environment"][key] = "; ".join(values)
    return found


def own_run(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What the page says of results that are of one run."""
    environment = results["environment"]
    own = {key: environment.get(key, "") for key in OF_A_RUN}
    own["cores"] = environment.get("cores", "")
    return {"name": name, **own, "bandwidth": results.get("bandwidth", {})}


def _add(found: dict[str, Any], one: dict[str, Any], name: str) -> None:
    """Puts one run's figures into those that were found before."""
    runs = one.get("runs") or [own_run(one, name)]
    names = {run["name"] for run in runs}
    found["runs"] = [run for run in found["runs"] if run["name"] not in names] + runs
    for part, keys in KEYS.items():
        found[part] = _replaced(found[part], one.get(part, []), keys, name)
    for series, points in one.get("scaling", {}).items():
        before = found["scaling"].get(series, [])
        found["scaling"][series] = _replaced(before, points, ("method",), name)
    found["bandwidth"] = one.get("bandwidth") or found["bandwidth"]
    found["left_out"] += [x for x in one.get("left_out", []) if x not in found["left_out"]]


def _replaced(
    before: list[dict[str, Any]], new: list[dict[str, Any]], keys: tuple[str, ...], run: str
) -> list[dict[str, Any]]:
    """Those before without what is new, then the new ones, each with the name of its run."""

    def key(element: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(element.get(k) for k in keys)

    again = {key(x) for x in new}
    kept = [x for x in before if key(x) not in again]
    return kept + [{**x, "run": x.get("run", run)} for x in new]


def runs_of(elements: list[dict[str, Any]]) -> list[str]:
    """The names of the runs that these are from, as far as it is known."""
    return list(dict.fromkeys(x["run"] for x in elements if "run" in x))


def busy(run: dict[str, Any]) -> bool:
    """Whether more was computing before this run than the machine has cores."""
    load = str(run["load"]).split()
    return bool(load and run.get("cores")) and float(load[0]) > float(run["cores"]) + 0.5
