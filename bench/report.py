"""Tables for the terminal, and the JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .suite import claims


def print_report(results: dict[str, Any], console: Console) -> None:
    """The whole report as tables."""
    env = results["environment"]
    console.print(
        f"\n[bold]pysmooth {env['pysmooth']}[/] ({env['commit']}), torch {env['torch']}, "
        f"{env['cpu']}, {env['threads']} threads, kernels: {env['isa']}"
    )
    if results["end_to_end"]:
        _end_to_end(results["end_to_end"], console)
    if results["rows"]:
        _methods(results["rows"], console)
    if results["numerics"]:
        _numerics(results["numerics"], console)
    _figures(results, console)
    if results["left_out"]:
        console.print("\n[bold]Left out of this run[/]")
        for line in results["left_out"]:
            console.print(f"  {line}")


def _end_to_end(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Training, same seed and data", title_justify="left")
    for column in ("training", "optimizer", "steps/s", "clip + step", "share", "last loss"):
        table.add_column(column, justify="left" if column in ("training", "optimizer") else "right")
    for row in rows:
        for side, label in (("torch", "torch SGD + clip"), ("pysmooth", "pysmooth.ClipSGD")):
            f, losses = row[side], row[f"losses_{side}"]
            last = sum(losses[-10:]) / len(losses[-10:])
            table.add_row(
                row["name"] if side == "torch" else row["description"],
                label,
                f"{f['steps_per_s']:.1f}",
                f"{f['optimizer_ms']:.3f} ms",
                f"{f['optimizer_share']:.1%}",
                f"{last:.4f}",
            )
        table.add_section()
    console.print(table)
    for row in rows:
        console.print(
            f"{row['name']}: {row['verdict']} Largest difference of the losses over "
            f"{row['steps']} steps: {row['max_loss_difference']:.1e}."
        )


def _methods(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        title="One step, medians; x = rival's time / pysmooth's, from the same rounds",
        title_justify="left",
    )
    for column in ("model", "method", "contestant", "ms", "spread", "x", "roofline"):
        left = column in ("model", "method", "contestant")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        for c in row["contestants"]:
            ours = c["name"] == "pysmooth"
            name = f"pysmooth ({row['backend']})" if ours else c["name"]
            if c["compile_s"] is not None:
                name += f" ({c['compile_s']:.0f} s to compile)"
            fraction = row["roofline_fraction"]
            table.add_row(
                row["model"] if ours else "",
                row["method"] if ours else "",
                name,
                f"{c['median_ms']:.3f}",
                f"{c['iqr_ms']:.3f}",
                "" if ours else f"{c['ratio']:.2f}" if claims(row) else "no claim",
                f"{fraction:.2f}" if ours and fraction is not None else "",
            )
        table.add_section()
    console.print(table)


def _numerics(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        title="Against float64: largest error of one step, in ULP; distance after so many steps",
        title_justify="left",
    )
    for column in ("method", "steps", "ULP", "rival's", "distance", "rival's ", "rival"):
        left = column in ("method", "rival")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for before, n in zip([{}, *rows], rows, strict=False):
        first = before.get("method") != n["method"]
        if first and before:
            table.add_section()
        table.add_row(
            n["method"] if first else "",
            str(n["steps"]),
            ulp(n["pysmooth_max_ulp"]),
            ulp(n["rival_max_ulp"]),
            f"{n['pysmooth_relative_error']:.1e}",
            f"{n['rival_relative_error']:.1e}",
            n["rival"] if first else "",
        )
    console.print(table)


def ulp(value: float | None) -> str:
    """An error of one step; none where 16-bit numbers are kept."""
    return "" if value is None else f"{value:.2f}"


def _figures(results: dict[str, Any], console: Console) -> None:
    if results["bandwidth"]:
        parts = [f"{name} {value:.1f}" for name, value in results["bandwidth"].items()]
        console.print("Bandwidth of this machine, GB/s: " + ", ".join(parts))
    for h in results["host"]:
        console.print(
            f"Host + kernels, fresh gradients, {h['model']} ({h['tensors']} tensors): "
            f"{h['pysmooth_us_per_tensor']:.2f} us per tensor, torch fused + clip "
            f"{h['torch_us_per_tensor']:.2f} ({h['ratio']:.1f}x)"
        )
    for s in results["selection"]:
        console.print(
            f"Top-k 1 %, {s['gradients']}: {s['second_looks']} of {s['selections']} selections "
            f"took a second look"
        )
    for f in results["first_step"]:
        if f["state_bytes"]:
            console.print(
                f"First step of {f['method']} on {f['model']}: {f['first_ms']:.1f} ms, which "
                f"allocates and touches {f['state_bytes'] / 1e6:.1f} MB of state; later ones "
                f"{f['later_ms']:.2f} ms"
            )


def write_json(results: dict[str, Any], out_dir: Path, name: str = "results.json") -> Path:
    """Everything that was measured, for machines."""
    path = out_dir / name
    whole = path.with_suffix(".part")  # nobody finds half a file
    whole.write_text(json.dumps(results, indent=1) + "\n")
    return whole.replace(path)
