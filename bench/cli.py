"""The command line: `python -m pysmooth.bench` or `pysmooth-bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import rivals
from .aggregation import aggregate
from .comm.cli import comm
from .compare.cli import compare
from .methods import DTYPES, METHODS
from .models import MODELS
from .page.cli import report
from .papers.cli import papers
from .suite import Keep, Options, run_suite, set_threads

app = typer.Typer(add_completion=False)
app.command()(aggregate)
app.command()(comm)
app.command()(compare)
app.command()(papers)
app.command()(report)

CPU_MODELS = ["resnet20", "resnet50", "bert-base", "many-tiny", "gpt2-124m"]
GPU_MODELS = [*CPU_MODELS, "llama-3.2-1b"]


def _pick(option: str, text: str | None, known: list[str], default: list[str]) -> list[str]:
    if text is None:
        return default
    chosen = [part.strip() for part in text.split(",")]
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is not one of: {', '.join(known)}", param_hint=option
            )
    return chosen


def default_out() -> Path:
    """bench/results/local in a checkout, else a folder where the command was started."""
    root = Path(__file__).resolve().parent
    in_checkout = (root.parent / ".git").exists()
    return root / "results" / "local" if in_checkout else Path("pysmooth-bench-results")


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    methods: Annotated[str | None, typer.Option(help="Default: all on named models.")] = None,
    models: Annotated[str | None, typer.Option(help=f"Of {', '.join(MODELS)}.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Default: torch's.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the large models.")] = 15,
    rivals_: Annotated[str | None, typer.Option("--rivals", help="Comma-separated.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All models, all rivals; an hour.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A look in half a minute.")] = False,
    end_to_end: Annotated[bool, typer.Option(help="Train the small models first.")] = True,
    out: Annotated[Path | None, typer.Option(help="Where the files go.")] = None,
) -> None:
    """Measures pysmooth against every rival that is installed, and writes a report."""
    if context.invoked_subcommand is not None:
        return
    set_threads(threads)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}", param_hint="--dtype")
    known_rivals = list(rivals.NAMES)
    options = Options(dtype=dtype, device=device, rounds=rounds)
    if full:
        options.models = GPU_MODELS if device.startswith("cuda") else CPU_MODELS
        options.compile_models = options.models
        options.seconds, options.compile_reserve, options.every_method = 7200.0, 0.0, True
    if quick:
        options.models, options.compile_models = ["resnet20", "many-tiny"], []
        options.end_to_end_seconds, options.rounds = 6.0, 5
        options.parts = tuple(part for part in options.parts if part != "selection")
    options.methods = _pick("--methods", methods, list(METHODS), options.methods)
    if methods is not None or models is not None:  # asked for by name
        options.every_method, options.seconds, options.compile_reserve = True, 7200.0, 0.0
    options.models = _pick("--models", models, list(MODELS), options.models)
    options.rivals = _pick("--rivals", rivals_, known_rivals, options.rivals)
    if not end_to_end or device != "cpu":
        options.end_to_end_seconds = 0.0
    execute(options, out or default_out())


def execute(options: Options, out_dir: Path) -> None:
    """Runs the suite, prints the report, writes the files and names them."""
    from .report import write_json

    def keep(results: dict[str, Any]) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(results, out_dir)

    console = Console()
    write_files(measured(options, console, keep), out_dir, console)


def measured(
    options: Options, console: Console, keep: Keep = lambda results: None
) -> dict[str, Any]:
    """Runs the suite, and prints the report; keep() gets what there is after every race."""
    from .report import print_report

    if not console.is_terminal:
        console = Console(width=120)  # a log file has room
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        results = run_suite(options, lambda text: progress.update(task, description=text), keep)
    print_report(results, console)
    return results


def write_files(results: dict[str, Any], out_dir: Path, console: Console) -> None:
    """Writes the JSON, the pictures and the page, and names them."""
    from .page import write_page
    from .plots import write_plots
    from .report import write_json

    out_dir.mkdir(parents=True, exist_ok=True)
    files = [write_json(results, out_dir)]
    plots = write_plots(results, out_dir)
    files += [*plots, write_page(results, out_dir)]
    console.print("\n[bold]Files written[/]")
    for path in files:
        console.print(f"  {path}", soft_wrap=True)


def main() -> None:
    """The entry point."""
    app()
