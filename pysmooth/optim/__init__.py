"""The public optimizers, one file per family."""

from __future__ import annotations

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .clip_sgd import ClipSGD
from .sign import Lion, SignSGD, Signum

__all__ = ["Adagrad", "Adam", "AdamW", "ClipSGD", "Lion", "SignSGD", "Signum"]
