"""Fused multi-tensor optimizers for PyTorch: clipping inside the step, at the memory floor."""

from __future__ import annotations

from ._clip_grad import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from ._errors import BackendError, NonFiniteGradientError
from .optim import Adagrad, Adam, AdamW, ClipSGD, Lion, SignSGD, Signum

__version__ = "0.1.0"

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "BackendError",
    "ClipSGD",
    "Lion",
    "NonFiniteGradientError",
    "SignSGD",
    "Signum",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
