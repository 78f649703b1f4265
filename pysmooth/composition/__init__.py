"""Optimizers put together from parts: `chain` of `parts`, `compose`."""

from __future__ import annotations

from . import parts
from .base import Chain, chain
from .compose import ComposedOptimizer, compose
from .table import fused_table

__all__ = ["Chain", "ComposedOptimizer", "chain", "compose", "fused_table", "parts"]
