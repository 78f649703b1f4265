"""What was aimed at, against what was measured: printed, and kept with the figures."""

from __future__ import annotations

from typing import Any

CLAIMED = ("sign, both ways, EF", "EF14 top-1 %")
RATE = "1gbit"
SPEEDUP, LOSS, PACKING = 3.0, 0.02, 0.10


def _verdict(
    contestant: str, where: str, claim: str, value: float | None, measured: str, *, holds: bool
) -> dict[str, Any]:
    return {
        "contestant": contestant,
        "where": where,
        "claim": claim,
        "value": value,
        "measured": measured,
        "holds": holds,
    }


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what was measured: a row per claim and contestant; nothing about what was not.

    The loss is that on held-out batches after as many steps as dense took, each with the learning
    rate stated; a lower one holds. Packing is what the hook's threads work in a step, of the time
    that dense communication takes and the hook's does not; beside it stands what the hook adds to
    a step in a group of one rank, where nothing travels and a server's share is the whole.
    """
    out = []
    for found in results["races"]:
        if found["rate"] != RATE:
            continue
        where = f"{found['description']}, {found['ranks']} ranks, {RATE}"
        for row in found["rows"]:
            if row["contestant"] not in CLAIMED:
                continue
            name, speed, share = row["contestant"], row["speedup"], row["packing_share"]
            claim = f"a step at least {SPEEDUP:g}x as fast as dense"
            measured = f"{speed:.2f}x"
            out.append(_verdict(name, where, claim, speed, measured, holds=speed >= SPEEDUP))
            claim = f"packing at most {PACKING:.0%} of the communication it saves"
            held = share is not None and share <= PACKING
            alone = row["packing_alone_share"]
            measured = "it saves none" if share is None else f"{share:.1%}"
            if alone is not None:
                measured += f" (in a group of one rank {alone:.1%})"
            out.append(_verdict(name, where, claim, share, measured, holds=held))
    for found in results["qualities"]:
        dense = found["quality"]["dense"]
        where = f"{found['description']}, {found['steps']} steps"
        for name in CLAIMED:
            if (row := found["quality"].get(name)) is None:
                continue
            more = row["held_out"] / dense["held_out"] - 1
            claim = f"loss at most {LOSS:.0%} above dense"
            measured = (
                f"{more:+.1%} ({row['held_out']:.4f} at lr {row['lr']:g}, "
                f"dense {dense['held_out']:.4f} at lr {dense['lr']:g})"
            )
            out.append(_verdict(name, where, claim, more, measured, holds=more <= LOSS))
    return out
