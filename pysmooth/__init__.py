"""Fused multi-tensor optimizers for PyTorch: clipping inside the step, at the memory floor."""

from __future__ import annotations

from . import compressors
from ._agc import agc_
from ._clip_grad import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from ._doctor import doctor
from ._errors import BackendError, NonFiniteGradientError
from .composition import chain, compose, parts
from .compressors import (
    QSGD,
    HardThreshold,
    Identity,
    NaturalCompression,
    RandK,
    ScaledSign,
    TopK,
)
from .optim import (
    EF21,
    EF21SGD2M,
    EF21SGDM,
    EFSGD,
    Adagrad,
    AdagradNorm,
    Adam,
    AdamDNorm,
    AdamNorm,
    AdamW,
    Clip21,
    Clip21SGD2M,
    ClipRAdaGradD,
    ClipSGD,
    EF21Plus,
    Lion,
    MAdagradNorm,
    NormalizedSGD,
    NormEF21,
    NormEF21SGDM,
    SignSGD,
    Signum,
    swap,
    unswap,
)

__version__ = "0.1.0"

__all__ = [
    "EF21",
    "EF21SGD2M",
    "EF21SGDM",
    "EFSGD",
    "QSGD",
    "Adagrad",
    "AdagradNorm",
    "Adam",
    "AdamDNorm",
    "AdamNorm",
    "AdamW",
    "BackendError",
    "Clip21",
    "Clip21SGD2M",
    "ClipRAdaGradD",
    "ClipSGD",
    "EF21Plus",
    "HardThreshold",
    "Identity",
    "Lion",
    "MAdagradNorm",
    "NaturalCompression",
    "NonFiniteGradientError",
    "NormEF21",
    "NormEF21SGDM",
    "NormalizedSGD",
    "RandK",
    "ScaledSign",
    "SignSGD",
    "Signum",
    "TopK",
    "agc_",
    "chain",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "compose",
    "compressors",
    "doctor",
    "get_total_norm",
    "parts",
    "swap",
    "unswap",
]
