"""SDE models of distributed SGD, compressed SGD and sign SGD, first order in the step size.

The corrected drifts that a later paper has for compressed and sign SGD are not known, and left out.
"""

from __future__ import annotations

from .models import SDE, dcsgd, dsgd, dsignsgd, sgd_stability, sign_slope, stationary_variance
from .simulate import euler_maruyama

__all__ = [
    "SDE",
    "dcsgd",
    "dsgd",
    "dsignsgd",
    "euler_maruyama",
    "sgd_stability",
    "sign_slope",
    "stationary_variance",
]
