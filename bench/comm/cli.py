"""The command line of `python -m pysmooth.bench comm`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from ..machine import environment
from .contestants import CONTESTANTS, with_dense_below
from .launch import launch
from .link import LinkUnavailableError, bytes_per_second
from .report import print_quality, print_race, print_thresholds, print_verdicts, write
from .thresholds import thresholds
from .verdicts import CLAIMED
from .worker import Task
from .workloads import WORKLOADS


def _chosen(option: str, text: str | None, known: list[str]) -> list[str]:
    if text is None:
        return known
    chosen = [part.strip() for part in text.split(";" if ";" in text else ",")]
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of: {'; '.join(known)}", param_hint=option)
    return chosen


def _rates(text: str) -> list[str]:
    rates = [part.strip() for part in text.split(",")]
    for rate in rates:
        if rate != "loopback":
            try:
                bytes_per_second(rate)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--rates") from None
    return rates


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of numbers", param_hint="--dense-below"
        ) from None


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # through every `finally`: networks are taken down


def comm(
    workloads: Annotated[str | None, typer.Option(help=f"Of {', '.join(WORKLOADS)}.")] = None,
    hooks: Annotated[str | None, typer.Option(help="Separated by ; (default: all).")] = None,
    rates: Annotated[
        str, typer.Option(help="Of each rank's link, as tc writes them; or loopback.")
    ] = "loopback,100mbit,1gbit,10gbit",
    ranks: Annotated[int, typer.Option(help="Processes.", min=2, max=16)] = 2,
    rounds: Annotated[int, typer.Option(help="Steps that are timed.", min=3)] = 9,
    quality: Annotated[bool, typer.Option(help="Train, and compare losses.")] = True,
    dense_below: Annotated[
        str | None, typer.Option(help="Race the claimed methods with these `dense_below`, too.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One workload, few steps.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the files go.")] = None,
) -> None:
    """Measures hooks of DistributedDataParallel against dense sums: bytes, time, loss.

    On links of known speed, which it makes of network namespaces and takes down again (Linux, as
    root, with iproute2).
    """
    from ..cli import default_out

    signal.signal(signal.SIGTERM, _stop)
    names = _chosen("--hooks", hooks, list(CONTESTANTS))
    names = ["dense", *(name for name in names if name != "dense")]
    numels = _numbers(dense_below)
    if numels:  # what they are compared with
        names += [name for name in CLAIMED if name not in names]
    chosen = _chosen("--workloads", workloads, list(WORKLOADS))
    asked = _rates(rates)
    if quick:
        chosen, rounds, asked = chosen[:1], 3, asked[:2]
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    results: dict[str, Any] = {"environment": environment("cpu"), "races": [], "qualities": []}
    for workload in chosen:
        training = WORKLOADS[workload].make()
        known = {"workload": workload, "ranks": ranks, "description": training.name}
        for rate in asked:
            more = [with_dense_below(name, numel) for name in CLAIMED for numel in numels]
            task = Task(workload, [*names, *more], rounds, "", 0, "")
            try:
                with console.status(f"{training.name}, {rate}"):
                    found = launch(task, ranks, None if rate == "loopback" else rate)
            except LinkUnavailableError as error:
                console.print(f"{rate}: not measured, no such link can be made here: {error}")
                continue
            found |= {**known, "rate": rate}
            results["races"].append(found)
            print_race(found, console)
        if quality:
            steps = 20 if quick else WORKLOADS[workload].steps
            with console.status(f"{training.name}, {steps} steps with every hook"):
                found = launch(Task(workload, names, 0, "", steps, ""), ranks, None)
            found |= {**known, "steps": steps}
            results["qualities"].append(found)
            print_quality(found, console)
    if numels:
        results["dense_below"] = thresholds(results, numels)
    files = write(results, out or default_out())
    print_verdicts(results, console)
    if numels:
        print_thresholds(results, console)
    console.print("\n[bold]Files written[/]")
    for path in files:
        console.print(f"  {path}", soft_wrap=True)
