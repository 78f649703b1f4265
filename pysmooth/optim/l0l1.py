"""(L0,L1)-GD by its own name."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from .clip_sgd import ClipSGD


class L0L1GD(ClipSGD):
    r"""(L0,L1)-GD: p = p - eta / (L0 + L1 \|\|g\|\|) * g, and 0 where that has no value.

    The class of `ClipSGD.from_smoothness(params, L0, L1, eta)`, whose page has the formulas, the
    other arguments, state and errors. `L0L1SGD` is the same class: (L0,L1)-SGD takes the norm of
    the batch's gradient.

    Convex and (L0,L1)-smooth along segments, eta <= 0.2836 (nu / 2): the loss never rises, and
    f - f* <= 2 L0 R^2 / (eta (N + 1)) after at most 8 L1^2 R^2 / (eta nu) steps with a large
    gradient. eta = 1 is the step of arXiv:2412.17050: linear while \|\|g\|\| >= L0 / L1, and for
    ever if L0 = 0.

    Args:
        params: as in `pysmooth.ClipSGD`.
        L0: smoothness at stationary points, at least 0; L0 and L1 must not both be 0.
        L1: growth of the smoothness with the gradient's norm, at least 0.
        eta: step size factor, the group's `lr`.
        **kwargs: as in `ClipSGD.from_smoothness`.

    Source: arXiv:2409.14989, 2412.17050, 1905.11881.
    """

    def __init__(
        self, params: ParamsT, L0: float, L1: float, eta: float = 1.0, **kwargs: Any
    ) -> None:
        self.set_smoothness(params, L0, L1, eta, kwargs)


L0L1SGD = L0L1GD
