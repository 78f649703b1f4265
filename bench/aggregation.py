"""A server's sum over its clients' vectors: one pass, against the ways to write it in torch.

Every contestant gives the sum of weights[c] * vectors[c] and its norm, from vectors that lie apart
from one another, as messages arrive. pysmooth's terms are float64, torch's fastest forms sum up in
float32; the loop with a float64 sum is as accurate. The floor reads every vector once and reads and
writes the sum once: the best that the machine's probes do with these very vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pysmooth.engine import available_backends, probe
from pysmooth.federated.aggregate import weighted_sum

from .suite import set_threads
from .timing import interleave, ratio, ratio_quartiles

OURS, FLOOR = "pysmooth", "floor"
SIZES = "10x1000000,100x1000000,10x10000000"
Run = Callable[[], float]


class Sums:
    """The contestants, on the same vectors.

    Args:
        clients: C.
        size: N, elements of each.
    """

    def __init__(self, clients: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.clients, self.size = clients, size
        self.vectors = [torch.randn(size, generator=generator) for _ in range(clients)]
        self.weights = [(i + 1) / clients for i in range(clients)]
        self.factors = torch.tensor(self.weights)
        self.out, self.wide = torch.empty(size), torch.empty(size, dtype=torch.float64)

    def runs(self) -> dict[str, Run]:
        """What to time, by name."""
        found = {
            OURS: self.ours,
            "stack, mv": self.stacked,
            "loop of add_": self.loop,
            "_foreach": self.foreach,
            "loop of add_, float64": self.loop_wide,
        }
        return {**found, FLOOR: self.floor} if "cpu" in available_backends() else found

    def ours(self) -> float:
        """The kernel; without it, its twin in torch."""
        return weighted_sum(self.vectors, self.weights, self.out)

    def stacked(self) -> float:
        """A copy of all of them, and BLAS."""
        torch.mv(torch.stack(self.vectors).t(), self.factors, out=self.out)
        return _norm(self.out)

    def loop(self) -> float:
        """One after another."""
        torch.mul(self.vectors[0], self.weights[0], out=self.out)
        for v, w in zip(self.vectors[1:], self.weights[1:], strict=True):
            self.out.add_(v, alpha=w)
        return _norm(self.out)

    def foreach(self) -> float:
        """A product of each, and halves added to halves."""
        terms = list(torch._foreach_mul(self.vectors, self.weights))
        while (n := len(terms)) > 1:
            half = n // 2
            torch._foreach_add_(terms[:half], terms[n - half :])
            terms = terms[: n - half]
        self.out.copy_(terms[0])
        return _norm(self.out)

    def loop_wide(self) -> float:
        """One after another, as accurate as ours."""
        self.wide.zero_()
        for v, w in zip(self.vectors, self.weights, strict=True):
            self.wide.add_(v, alpha=w)
        self.out.copy_(self.wide)
        return _norm(self.out)

    def floor(self) -> float:
        """Every vector read once, the sum read and written once."""
        for i in range(0, self.clients, 2):
            probe.mix([], self.vectors[i : i + 2])
        probe.mix([self.out], [])
        return 0.0


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def moved(clients: int, size: int) -> dict[str, int]:
    """Bytes that each way must move where nothing stays in a cache, by its passes.

    A vector that is written over counts twice: the CPU reads it first.
    """
    c, vector = clients, 4 * size
    passes = {
        OURS: c + 2,
        "stack, mv": 3 * c + c + 2 + 1,
        "loop of add_": 3 + 3 * (c - 1) + 1,
        "_foreach": 3 * c + 3 * (c - 1) + 3 + 1,
        "loop of add_, float64": 2 + 5 * c + 4 + 1,
        FLOOR: c + 2,
    }
    return {name: times * vector for name, times in passes.items()}


def measure(clients: int, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of each, and ratios to ours."""
    sums = Sums(clients, size)
    timed = interleave(sums.runs(), rounds=rounds)
    ours, predicted = timed[OURS], moved(clients, size)
    rows = {
        name: {
            "seconds": t.median,
            "bytes": predicted[name],
            "ratio": ratio(t, ours),
            "quartiles": ratio_quartiles(t, ours),
        }
        for name, t in timed.items()
    }
    return {"clients": clients, "size": size, "threads": torch.get_num_threads(), "rows": rows}


def aggregate(
    sizes: Annotated[str, typer.Option(help="CLIENTSxPARAMETERS, separated by commas.")] = SIZES,
    threads: Annotated[int | None, typer.Option(help="Default: torch's.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each.", min=3)] = 15,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
) -> None:
    """A federated server's sum over clients, against the ways to write it in torch."""
    set_threads(threads)
    try:
        pairs = [tuple(int(n) for n in one.split("x")) for one in sizes.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise typer.BadParameter("such as 100x1000000,10x50000", param_hint="--sizes")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    results = [measure(clients, size, rounds) for clients, size in pairs]
    for result in results:
        console.print(_table(result))
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['clients']} clients x {result['size']:,}, {result['threads']} threads"
    table = Table(title=title)
    for name in ("", "ms", "GB moved", "times ours", "middle half", "of the floor's speed"):
        table.add_column(name, justify="left" if name == "" else "right")
    rows = result["rows"]
    for name, row in rows.items():
        low, high = row["quartiles"]
        fraction = rows[FLOOR]["seconds"] / row["seconds"] if FLOOR in rows else None
        table.add_row(
            name,
            f"{1e3 * row['seconds']:.2f}",
            f"{row['bytes'] / 1e9:.3f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} - {high:.2f}",
            "" if fraction is None else f"{fraction:.2f}",
        )
    return table
