"""The command line of `python -m pysmooth.bench report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import rivals
from ..methods import METHODS
from ..models import MODELS
from ..suite import Options, empty_results

MODELS_OF_THE_REPORT = ["resnet20", "many-tiny", "gpt2-124m"]
METHODS_OF_THE_REPORT = [name for name in METHODS if "bf16-params" not in name]


def merged(files: list[Path]) -> dict[str, Any]:
    """Results of several runs as one; of a row or figure measured twice, the last file's counts."""
    found = empty_results("cpu")
    environments = []
    for file in files:
        try:
            one = json.loads(file.read_text())
            environments.append(one["environment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"{file}: {error!r}", param_hint="FILES") from None
        again = {_place(row) for row in one.get("rows", [])}
        found["rows"] = [row for row in found["rows"] if _place(row) not in again]
        for key in found:
            if key in ("rows", "left_out", "first_step"):
                found[key] += [x for x in one.get(key, []) if x not in found[key]]
            elif key != "environment" and one.get(key):
                found[key] = one[key]
    keys = list(dict.fromkeys(key for e in environments for key in e))
    found["environment"] = {
        key: "; ".join(dict.fromkeys(e[key] for e in environments if key in e)) for key in keys
    }
    return found


def _place(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("method", "model", "dtype"))


def report(
    files: Annotated[
        list[Path] | None, typer.Argument(help="results.json of earlier runs; none: measure now.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A look in a few minutes.")] = False,
    largest: Annotated[int, typer.Option(help="Parameters, at most, in the scaling.")] = 10**9,
    out: Annotated[Path | None, typer.Option(help="Where the files go.")] = None,
) -> None:
    """One HTML page with all that a sceptic may ask; 40 minutes, or from results already there."""
    from ..cli import default_out, execute, write_files

    out_dir = out or default_out()
    if files:
        write_files(merged(files), out_dir, Console())
        return
    options = Options(device=device, sceptic=True, largest=largest, seconds=7200.0)
    options.models = options.compile_models = MODELS_OF_THE_REPORT
    options.methods, options.every_method = METHODS_OF_THE_REPORT, True
    options.compile_reserve = 0.0
    if quick:
        options.models, options.methods = ["resnet20"], ["clip_sgd_momentum", "clip_adamw"]
        options.rivals = [name for name in rivals.NAMES if name != rivals.COMPILED]
        options.compile_models, options.rounds, options.end_to_end_seconds = [], 5, 6.0
        options.largest, options.memory_model = min(largest, 10**7), "resnet20"
        options.selection, options.scaling_seconds = False, 0.3
    if device != "cpu":
        options.end_to_end_seconds = 0.0
    assert set(options.models) <= set(MODELS)
    execute(options, out_dir)
