"""The parts that optimizers are put together from, each with its few lines of torch.

A part turns an update u, at first the gradient, into another one; after the last one
`p = p - lr * u`. Parts are immutable values: they hold settings, an optimizer holds their states.
"""

from .clipping import AdaptiveClip, Clip, Normalize
from .decay import Decay
from .feedback import ClipDifference, Compress
from .momentum import Average, Momentum
from .scaling import ScaleByAdagrad, ScaleByAdam, ScaleByNorm
from .sign import ScaleByLion, Sign

__all__ = [
    "AdaptiveClip",
    "Average",
    "Clip",
    "ClipDifference",
    "Compress",
    "Decay",
    "Momentum",
    "Normalize",
    "ScaleByAdagrad",
    "ScaleByAdam",
    "ScaleByLion",
    "ScaleByNorm",
    "Sign",
]
