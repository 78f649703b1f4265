"""The pipeline as Triton kernels. No rule is published yet, so no optimizer offers this backend."""

from __future__ import annotations

RULES: dict[str, object] = {}
