"""The report in pieces, each measured by a process of its own in less than nine minutes.

A machine is seldom left alone for an hour: pieces can be measured when it is, and be merged. What
races together is in one piece.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import rivals
from ..methods import METHODS
from ..suite import Options

SGD = (
    "clip_grad_norm (nothing clipped)",
    "clip_grad_norm (clipped)",
    "clip_sgd",
    "clip_sgd_momentum",
    "agc_sgd_momentum",
    "normalized_sgd",
)
# Optimizers of 16-bit parameters have rivals of their own, and a page (docs/methods).
ALL = tuple(name for name in METHODS if "bf16-params" not in name)
COMPRESSED = tuple(name for name in ALL if name.startswith(("ef", "clip21")))
ADAPTIVE = tuple(name for name in ALL if name not in (*SGD, *COMPRESSED))
NOT_COMPILED = [name for name in rivals.NAMES if name != rivals.COMPILED]
COMPILED_TINY = ("clip_sgd_momentum",)  # of 2,000 tensors, which takes minutes to compile
IN_MEMORY = (
    *("clip_sgd_momentum", "clip_adagrad", "clip_adamw", "clip_adamw-bf16-states", "signum"),
    *("lion", "ef_sgd-scaled-sign", "ef_sgd-top-k", "ef21-top-k", "clip21_sgd2m"),
)


def _speed(model: str, methods: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {
        "parts": ("speed",),
        "models": [model],
        "methods": list(methods),
        "compile_models": [model],
        "eager": True,
        "race_seconds": 15.0,
        **more,
    }


_TINY = tuple(name for name in ALL if name not in COMPILED_TINY)
_PIECES: dict[str, dict[str, Any]] = {
    "training": {"parts": ("training",), "end_to_end_seconds": 60.0},
    "host": {"parts": ("host", "selection")},
    "resnet20": _speed("resnet20", ALL, race_seconds=6.0),
    "many-tiny": _speed("many-tiny", _TINY, race_seconds=6.0, compile_models=[]),
    "many-tiny-compiled": _speed("many-tiny", COMPILED_TINY),
    "gpt2-sgd": _speed("gpt2-124m", SGD),
    "gpt2-adaptive": _speed("gpt2-124m", ADAPTIVE),
    "gpt2-compressed": _speed("gpt2-124m", COMPRESSED),
    "numerics": {"parts": ("numerics", "agreement")},
    "memory": {"parts": ("memory",), "methods": list(IN_MEMORY)},
    "scaling": {"parts": ("scaling",), "methods": ["clip_sgd_momentum", "clip_adamw"]},
}
NAMES = tuple(_PIECES)


def options(name: str, device: str, largest: int, quick: bool) -> Options:
    """What to run for one piece."""
    base = Options(device=device, largest=largest, methods=list(ALL), every_method=True)
    base = replace(base, seconds=7200.0, compile_reserve=0.0)  # nothing is left out for time
    if device != "cpu":
        base = replace(base, end_to_end_seconds=0.0)
    made = replace(base, **_PIECES[name])
    if not quick:
        return made
    return replace(
        made,
        models=["resnet20"],
        methods=["clip_sgd_momentum", "clip_adamw"],
        rivals=NOT_COMPILED,
        rounds=5,
        race_seconds=6.0,
        end_to_end_seconds=min(6.0, made.end_to_end_seconds),
        largest=min(largest, 10**7),
        memory_model="resnet20",
        scaling_seconds=0.3,
    )


def chosen(names: str | None, quick: bool) -> list[str]:
    """The pieces of a comma-separated list in the order of the page; all without a list.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = [name.strip() for name in names.split(",")] if names else list(NAMES)
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"{name!r} is not one of: {', '.join(NAMES)}")
    small = ("training", "host", "resnet20", "numerics", "memory", "scaling")
    return [name for name in NAMES if name in wanted and (names or not quick or name in small)]
