"""The command line of `python -m pysmooth.bench compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import instructions, times
from .build import WORKING, BuildError, built
from .process import WorkerError
from .worker import CASES

SLOWER = 1.01  # in instructions; times need twice that, for the whole middle half of the rounds


def verdict(time: dict[str, Any] | None, count: float | None) -> str:
    """What a case's figures say; instructions have the last word where they were counted."""
    if time is not None and "missing" in time:
        return "only one of them has it"
    if count is not None:
        return "slower" if count > SLOWER else "faster" if count < 1 / SLOWER else "the same"
    if time is None:
        return ""
    twice = SLOWER**2
    if time["low"] > twice:
        return "slower"
    return "faster" if time["high"] < 1 / twice else "the same, or too noisy to tell"


def compare(
    base: Annotated[str, typer.Argument(help="A revision: a commit, a tag, a branch.")],
    head: Annotated[str, typer.Option(help="Another one; default: the checkout as it is.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each, for the times.")] = 100,
    count: Annotated[bool, typer.Option(help="Count instructions; needs valgrind.")] = True,
    cases: Annotated[str, typer.Option(help="Separated by semicolons; default: all.")] = "",
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
) -> None:
    """Which steps got slower since BASE. Exit code 1 if some did."""
    chosen = [name.strip() for name in cases.split(";")] if cases else list(CASES)
    for name in chosen:
        if name not in CASES:
            raise typer.BadParameter(
                f"{name!r} is none of: {'; '.join(CASES)}", param_hint="--cases"
            )
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    if count and not instructions.available():
        console.print("Instructions are not counted: there is no valgrind with callgrind_control.")
        count = False
    counts: list[dict[str, float]] = []
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("building", total=None)

            def say(text: str) -> None:
                progress.update(task, description=text)

            (base_name, base_lib), (head_name, head_lib) = built(base), built(head or WORKING)
            timed = times.measure(base_lib, head_lib, chosen, rounds, say)
            if count:
                counts = [instructions.measure(lib, chosen, say) for lib in (base_lib, head_lib)]
    except (BuildError, WorkerError) as error:
        console.print(f"[bold]Cannot compare[/]: {error}", markup=True, highlight=False)
        raise typer.Exit(2) from None

    table = Table(
        title=f"{head_name} against {base_name}: above 1 it got slower", title_justify="left"
    )
    for column in ("step", "time", "middle half", "instructions", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")
    rows = []
    for name in chosen:
        time = timed[name]
        both = all(name in c for c in counts) and bool(counts)
        ratio = counts[1][name] / counts[0][name] if both else None
        row = {"case": name, **time, "instructions": ratio, "verdict": verdict(time, ratio)}
        rows.append(row)
        measured = "ratio" in time
        table.add_row(
            name,
            f"{time['ratio']:.3f}" if measured else "",
            f"{time['low']:.3f} to {time['high']:.3f}" if measured else "",
            "" if ratio is None else f"{ratio:.4f}",
            row["verdict"],
        )
    console.print(table)
    if out is not None:
        found = {"base": base_name, "head": head_name, "rows": rows}
        out.write_text(json.dumps(found, indent=1) + "\n")
    raise typer.Exit(int(any(row["verdict"] == "slower" for row in rows)))
