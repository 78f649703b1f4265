"""Parts that bound an update by its norm."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ... import reference
from ...engine.recipe import ClipMode, ClipSpec
from ...optim._base import check_scope
from ...optim._validate import check_choice, check_number
from ..base import Part, Run, ScopeName, norms


@dataclass(frozen=True)
class Clip(Part):
    """u = coef * u, with `coef` as `pysmooth.ClipSGD` has it for `clip=mode`; "value" clamps.

    Args:
        max_norm: the threshold, greater than 0.
        mode: "hard", "smooth", "normalize" or "value".
        scope: of the norm: "global", "group" or "tensor".
        eps: added to the norm, at least 0.
        norm_type: order of the norm, greater than 0.
    """

    max_norm: float
    mode: Literal["hard", "smooth", "normalize", "value"] = "hard"
    _: KW_ONLY
    scope: ScopeName = "global"
    eps: float = 1e-6
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        check_number("max_norm", self.max_norm, strict=True, infinite=True)
        check_choice("mode", self.mode, ("hard", "smooth", "normalize", "value"))
        check_scope(self.scope)
        check_number("eps", self.eps)
        check_number("norm_type", self.norm_type, strict=True, infinite=True)
        if self.mode == "normalize" and self.max_norm == math.inf:
            raise ValueError("max_norm must be finite for mode='normalize'")

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Scales, or clamps."""
        if self.mode == "value":
            if any(m.is_complex for m in run.members):
                raise ValueError("Clip(mode='value') has no meaning for complex parameters")
            return [u.clamp(-self.max_norm, self.max_norm) for u in us]
        spec = ClipSpec(ClipMode[self.mode.upper()], self.max_norm, self.eps)
        found = norms(us, run, self.scope, self.norm_type)
        return [
            u * reference.clip_coefficient(spec, norm).to(u.dtype)
            for u, norm in zip(us, found, strict=True)
        ]


@dataclass(frozen=True)
class AdaptiveClip(Part):
    r"""Each row of u by its own min(1, factor * max(\|\|row of p\|\|, eps) / \|\|row of u\|\|).

    Args:
        factor: of the parameter's norm, greater than 0.
        eps: the least norm that a row of p counts as.

    Source: arXiv:2102.06171 (adaptive gradient clipping).
    """

    factor: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_number("factor", self.factor, strict=True, infinite=True)
        check_number("eps", self.eps)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Scales rows."""
        spec = ClipSpec(ClipMode.AGC, self.factor, self.eps)
        out = []
        for u, m in zip(us, run.members, strict=True):
            pair = (m.p, u)
            if m.is_complex:
                pair = (torch.view_as_complex(m.p), torch.view_as_complex(u.contiguous()))
            out.append(u * reference.agc_coefficients(spec, *pair, 1.0).to(u.dtype))
        return out


@dataclass(frozen=True)
class Normalize(Part):
    r"""u = u / (\|\|u\|\| + eps), 0 where u is 0.

    Args:
        eps: added to the norm, at least 0.
        scope: of the norm: "global", "group" or "tensor".
    """

    eps: float = 0.0
    _: KW_ONLY
    scope: ScopeName = "global"

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        check_scope(self.scope)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Divides."""
        found = norms(us, run, self.scope)
        return [
            u * torch.where(norm == 0, 0.0, 1.0 / (norm + self.eps)).to(u.dtype)
            for u, norm in zip(us, found, strict=True)
        ]
