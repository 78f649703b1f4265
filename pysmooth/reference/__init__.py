"""Every method in plain eager PyTorch, for any dtype up to float64 and any device.

This is the oracle that the kernels are tested against, and what `backend="eager"` runs.
"""

from __future__ import annotations

from .accumulator import accumulate
from .clip import agc_coefficients, clip_coefficient, scale_, total_norm
from .random import round_stochastically
from .rules import EAGER_RULES, RULES, EagerRule, gradient_in
from .staged import Member, Passes
from .storage import Storage, compute_dtype

__all__ = [
    "EAGER_RULES",
    "RULES",
    "EagerRule",
    "Member",
    "Passes",
    "Storage",
    "accumulate",
    "agc_coefficients",
    "clip_coefficient",
    "compute_dtype",
    "gradient_in",
    "round_stochastically",
    "scale_",
    "total_norm",
]
