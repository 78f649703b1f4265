"""The public optimizers, one file per family."""

from __future__ import annotations

from ._swap import swap, unswap
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adaptive_norm import AdagradNorm, AdamDNorm, AdamNorm, ClipRAdaGradD, MAdagradNorm
from .adgd import AdGD, AdSGD
from .clip21 import Clip21, Clip21SGD2M
from .clip_sgd import ClipSGD
from .coordinate import CoordinateDescent, OrderOracleCD
from .ef21 import EF21, EF21SGD2M, EF21SGDM, EF21Plus, NormEF21, NormEF21SGDM
from .ef_sgd import EFSGD
from .l0l1 import L0L1GD, L0L1SGD
from .normalized_sgd import NormalizedSGD
from .polyak import PolyakSGD
from .sign import Lion, SignSGD, Signum
from .stm import STM
from .theory_clip import TheoryClipSGD

__all__ = [
    "EF21",
    "EF21SGD2M",
    "EF21SGDM",
    "EFSGD",
    "L0L1GD",
    "L0L1SGD",
    "STM",
    "AdGD",
    "AdSGD",
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
    "CoordinateDescent",
    "EF21Plus",
    "Lion",
    "MAdagradNorm",
    "NormEF21",
    "NormEF21SGDM",
    "NormalizedSGD",
    "OrderOracleCD",
    "PolyakSGD",
    "SignSGD",
    "Signum",
    "TheoryClipSGD",
    "swap",
    "unswap",
]
