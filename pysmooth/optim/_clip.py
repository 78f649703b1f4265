"""The arguments that every optimizer shares: the clip, and what goes with it."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from ..engine.recipe import ClipMode, ClipSpec
from ._validate import check_choice, check_flag, check_number

Clip = Literal["hard", "smooth", "normalize", "value", "agc", "none"]
ScopeName = Literal["global", "group", "tensor"]
NonFinite = Literal["propagate", "skip", "raise"]
# Where gradients are read for their norms.
Norm = Literal["in_step", "in_backward"]

_MODES = {
    "hard": ClipMode.HARD,
    "smooth": ClipMode.SMOOTH,
    "normalize": ClipMode.NORMALIZE,
    "value": ClipMode.NONE,  # per coordinate, as gradients are read: no norm is taken
    "agc": ClipMode.AGC,
    "none": ClipMode.NONE,
}


def check_clip(group: dict[str, Any]) -> None:
    """Refuses clip arguments that make no sense, naming the argument."""
    check_number("clip_eps", group["clip_eps"])
    check_flag("maximize", group["maximize"])
    clip = check_choice("clip", group["clip"], _MODES)
    check_number("agc_factor", group["agc_factor"], strict=True, infinite=True)
    check_number("agc_eps", group["agc_eps"])
    if group["max_norm"] is None:
        return
    check_number("max_norm", group["max_norm"], strict=True, infinite=True)
    if clip == "agc":
        raise ValueError("max_norm must be None for clip='agc', which takes agc_factor")
    if clip == "normalize" and group["max_norm"] == math.inf:
        raise ValueError("max_norm must be finite for clip='normalize'")
    if clip == "value":
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else params
        tensors = (p[1] if isinstance(p, tuple) else p for p in params)
        if any(p.is_complex() for p in tensors if isinstance(p, Tensor)):
            raise ValueError("clip='value' has no meaning for complex parameters")


def clip_spec(group: dict[str, Any]) -> ClipSpec:
    """What becomes of the group's gradients before the update rule."""
    mode, max_norm, maximize = _MODES[group["clip"]], group["max_norm"], group["maximize"]
    if mode == ClipMode.AGC:
        factor, eps = float(group["agc_factor"]), float(group["agc_eps"])
        return ClipSpec(mode, factor, eps, maximize=maximize)
    if mode == ClipMode.NORMALIZE and max_norm is None:
        max_norm = 1.0
    if max_norm is None:
        return ClipSpec(maximize=maximize)
    if group["clip"] == "value":
        return ClipSpec(value=float(max_norm), maximize=maximize)
    if mode == ClipMode.NONE:
        return ClipSpec(maximize=maximize)
    return ClipSpec(mode, float(max_norm), float(group["clip_eps"]), maximize=maximize)
