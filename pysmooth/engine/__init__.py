"""Runs recipes: one engine per backend, chosen per optimizer."""

from __future__ import annotations

from . import probe
from .backends import available_backends, make_engine, native_module
from .recipe import ClipSpec, Policy, Recipe, Scope

__all__ = [
    "ClipSpec",
    "Policy",
    "Recipe",
    "Scope",
    "available_backends",
    "make_engine",
    "native_module",
    "probe",
]
