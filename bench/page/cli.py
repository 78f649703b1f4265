"""The command line of `python -m pysmooth.bench report`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..report import write_json
from ..suite import set_threads
from . import pieces
from .merge import merged


def report(
    files: Annotated[
        list[Path] | None, typer.Argument(help="results.json of earlier runs; none: measure now.")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(help=f"Measure only these of {', '.join(pieces.NAMES)}; keep the others."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Default: torch's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look in a few minutes.")] = False,
    largest: Annotated[int, typer.Option(help="Parameters, at most, in the scaling.")] = 10**9,
    out: Annotated[Path | None, typer.Option(help="Where the files go.")] = None,
    page: Annotated[bool, typer.Option(help="Write the page, not only the results.")] = True,
) -> None:
    """One HTML page with all that a sceptic may ask; 50 minutes, or from results already there.

    It is measured in parts, each by a process of its own, whose results stay in the folder `runs`
    beside the page: `--parts` measures some of them again, or for the first time, and writes the
    page with all that are there.
    """
    from ..cli import default_out, measured, write_files

    out_dir = out or default_out()
    console = Console()
    if files:
        write_files(merged(files), out_dir, console)
        return
    try:
        names = pieces.chosen(parts, quick)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--parts") from None
    runs = out_dir / "runs"
    if len(names) == 1:
        set_threads(threads)
        results = measured(pieces.options(names[0], device, largest, quick), console)
        runs.mkdir(parents=True, exist_ok=True)
        write_json(results, runs, f"{names[0]}.json")
    else:
        rest = ["--device", device, "--largest", str(largest), "--out", str(out_dir), "--no-page"]
        rest += ["--quick"] * quick + (["--threads", str(threads)] if threads else [])
        for i, name in enumerate(names):
            console.print(f"[bold]{i + 1} of {len(names)}: {name}[/]")
            command = [sys.executable, "-m", "pysmooth.bench", "report", "--parts", name, *rest]
            subprocess.run(command, check=True)
    if page:
        there = [runs / f"{name}.json" for name in pieces.NAMES]
        write_files(merged([file for file in there if file.exists()]), out_dir, console)
