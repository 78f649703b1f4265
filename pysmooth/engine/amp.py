"""What torch.amp.GradScaler hands to a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Amp(NamedTuple):
    """The scale that gradients are to be divided by, and a number that is not 0 after an overflow.

    None: gradients are unscaled already, or nobody scales.
    """

    scale: Tensor | None = None
    found_inf: Tensor | None = None

    def read(self) -> float | None:
        """What to multiply gradients by, None if the step must not happen. Waits for the device."""
        if self.found_inf is not None and float(self.found_inf) != 0:
            return None
        if self.scale is None:
            return 1.0
        # Rounded as GradScaler does it, so that a step is the same with and without unscale_().
        return float(torch.as_tensor(self.scale).double().reciprocal().float())


NO_AMP = Amp()
