"""The command line of `python -m pysmooth.bench papers`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .outcome import Check, Config, Experiment
from .registry import found, need


def papers(
    ids: Annotated[list[str] | None, typer.Argument(help="Experiments; default: all.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each method.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few steps, few runs.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder with a9a, mushrooms, phishing (libsvm).")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Experiments at a time; default: cores.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where JSON and pictures go.")] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Also write papers.md there, of all complete runs in OUT.")
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="Name the experiments.")] = False,
) -> None:
    """Re-creates claims of papers with pysmooth's own methods: figures and verdicts."""
    from ..cli import default_out

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    known = found()
    if names:
        for one in known.values():
            console.print(f"{one.id:14} {one.title} ({', '.join(one.papers)})")
        return
    for name in ids or []:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of: {', '.join(known)}")
    if data is not None and not data.is_dir():
        raise typer.BadParameter(f"{data} is no folder", param_hint="--data")
    if quick and docs is not None:
        raise typer.BadParameter("the page is of complete runs: not with --quick")
    need("matplotlib")
    folder = out or default_out() / "papers"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [known[i] for i in ids or known]
    jobs = min(jobs or os.cpu_count() or 1, len(chosen))
    results = _run(chosen, Config(seeds, quick, data), folder, jobs, console)
    if docs is not None:
        _document(folder, docs)
    checks = [check for result in results for check in result["checks"]]
    holding = sum(check["holds"] for check in checks)
    console.print(f"\n{holding} of {len(checks)} claims hold. Figures and JSON: {folder}")


def _run(
    chosen: list[Experiment], config: Config, folder: Path, jobs: int, console: Console
) -> list[dict[str, Any]]:
    from .runner import run_beside, run_one

    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("experiments", total=len(chosen))
        if jobs > 1:
            ended = run_beside(chosen, config, folder, jobs)
        else:
            loop = progress.add_task("")

            def tell(what: str, done: int, total: int) -> None:
                progress.update(loop, description=what, completed=done, total=total)

            ended = (run_one(one, replace(config, tell=tell), folder) for one in chosen)
        for result in ended:
            results.append(result)
            console.print(
                f"\n[bold]{result['id']}[/] {result['title']} ({result['seconds']} s)",
                highlight=False,
            )
            for check in result["checks"]:
                _print(Check(**check), console)
            progress.advance(whole)
    return results


def _print(check: Check, console: Console) -> None:
    style = "green" if check.holds else "red"
    console.print(f"  {check.line()}", style=style, markup=False, highlight=False)


def _document(folder: Path, docs: Path) -> None:
    from .plot import draw
    from .report import page, read_all

    results = read_all(folder)
    (docs / "papers").mkdir(parents=True, exist_ok=True)
    for result in results:
        draw(result, docs / "papers" / f"{result['id']}.png")
    (docs / "papers.md").write_text(page(results))
