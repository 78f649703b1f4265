"""The public optimizers, one file per family."""

from __future__ import annotations

from ._swap import swap, unswap
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adaptive_norm import AdagradNorm, AdamDNorm, AdamNorm, ClipRAdaGradD, MAdagradNorm
from .clip21 import Clip21, Clip21SGD2M
from .clip_sgd import ClipSGD
from .ef21 import EF21, EF21SGD2M, EF21SGDM, EF21Plus, NormEF21, NormEF21SGDM
from .ef_sgd import EFSGD
from .normalized_sgd import NormalizedSGD
from .sign import Lion, SignSGD, Signum

__all__ = [
    "EF21",
    "EF21SGD2M",
    "EF21SGDM",
    "EFSGD",
    "Adagrad",
    "AdagradNorm",
    "Adam",
    "AdamDNorm",
    "AdamNorm",
    "AdamW",
    "Clip21",
    "Clip21SGD2M",
    "ClipRAdaGradD",
    "ClipSGD",
    "EF21Plus",
    "Lion",
    "MAdagradNorm",
    "NormEF21",
    "NormEF21SGDM",
    "NormalizedSGD",
    "SignSGD",
    "Signum",
    "swap",
    "unswap",
]
