"""The exceptions that pysmooth adds to Python's own."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run: not built, or not for these parameters."""


class NonFiniteGradientError(RuntimeError):
    """A gradient holds an infinity or a NaN, and the policy is to raise.

    Parameters and optimizer states are as they were before the step.
    """
