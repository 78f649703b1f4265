"""The public optimizers, one file per family."""

from __future__ import annotations

from .adagrad import Adagrad
from .adam import Adam, AdamW
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
    "Adam",
    "AdamW",
    "Clip21",
    "Clip21SGD2M",
    "ClipSGD",
    "EF21Plus",
    "Lion",
    "NormEF21",
    "NormEF21SGDM",
    "NormalizedSGD",
    "SignSGD",
    "Signum",
]
