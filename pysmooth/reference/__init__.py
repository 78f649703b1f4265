"""Every method in plain eager PyTorch, for any dtype up to float64 and any device.

This is the oracle that the kernels are tested against, and what `backend="eager"` runs.
"""

from __future__ import annotations

from .clip import clip_coefficient, scale_, total_norm
from .rules import RULES, EagerRule

__all__ = ["RULES", "EagerRule", "clip_coefficient", "scale_", "total_norm"]
