"""The public optimizers, one file per family."""

from __future__ import annotations

from .clip_sgd import ClipSGD

__all__ = ["ClipSGD"]
