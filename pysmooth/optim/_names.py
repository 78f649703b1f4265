"""Names of parameters, which torch's optimizers take from torch 2.6 on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

#: Whether torch's own optimizers do.
TAKES_NAMES = TorchVersion(torch.__version__) >= "2.6"


def set_names(group: dict[str, Any]) -> None:
    """What torch makes of a group of (name, parameter), where it does not do so itself."""
    pairs = group["params"]
    named = [isinstance(p, tuple) and len(p) == 2 and isinstance(p[1], Tensor) for p in pairs]
    if pairs and all(named):
        group["param_names"] = [name for name, _ in pairs]
        group["params"] = [p for _, p in pairs]
