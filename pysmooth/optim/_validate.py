"""Checks of hyper-parameters. Every message names the argument and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """`value`, if it is one of the names in `choices`."""
    options = list(choices)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")
    return value


def check_number(
    name: str, value: Any, *, low: float = 0.0, strict: bool = False, infinite: bool = False
) -> float:
    """`value` as a float, if it is a number (or one-element tensor) of at least `low`.

    NaN is refused. `strict` refuses `low` itself, `infinite` takes infinity.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a one-element tensor")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    number = float(value)
    if math.isnan(number) or number < low or (strict and number == low):
        bound = f"greater than {low:g}" if strict else f"at least {low:g}"
        raise ValueError(f"{name} must be {bound}; got {number}")
    if not infinite and math.isinf(number):
        raise ValueError(f"{name} must be finite; got {number}")
    return number


def check_below_one(name: str, value: float | Tensor) -> None:
    """Refuses what is not in [0, 1)."""
    if check_number(name, value) >= 1:
        raise ValueError(f"{name} must be in [0, 1); got {float(value)}")


def check_flag(name: str, value: object) -> None:
    """Refuses anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_seed(name: str, value: object) -> None:
    """Refuses anything but an integer of 64 bits, without sign."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"{name} must be an integer from 0 to 2^64 - 1; got {value!r}")
