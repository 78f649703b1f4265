"""The privacy budget of clipped and noised messages, counted by opacus."""

from __future__ import annotations

import warnings
from types import ModuleType

from .._extras import needs

# What a change of one client's data can change in its message: two vectors of length tau differ by
# at most twice that. In units of tau.
_SENSITIVITY = 2.0
_ORDERS = [1 + x / 10 for x in range(1, 100)] + [float(x) for x in range(11, 64)]
_ORDERS += [2.0**x for x in range(6, 15)]


def privacy_spent(noise_std: float, tau: float, rounds: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after so many messages of one client.

    Local privacy: the messages alone may be seen, by the server as well. Adjacent are any two data
    sets of the client (one replaced by the other), so that the sensitivity is 2 * tau; being asked
    in some rounds only, or looking at some samples only, is not counted as hiding anything.

    Args:
        noise_std: per coordinate of a message, before `beta_hat`.
        tau: clipping threshold.
        rounds: messages that the client sends.
        delta: in (0, 1).

    Raises:
        ImportError: opacus is not installed.
    """
    _check(tau, rounds, delta)
    if not noise_std > 0:
        raise ValueError(f"noise_std must be greater than 0; got {noise_std!r}")
    accountant = _opacus().RDPAccountant()
    accountant.history = [(noise_std / (_SENSITIVITY * tau), 1.0, rounds)]
    return float(accountant.get_epsilon(delta, alphas=_ORDERS))


def noise_for_budget(
    epsilon: float, delta: float, tau: float, rounds: int, *, tolerance: float = 1e-3
) -> float:
    """The noise_std with which so many messages cost at most `epsilon`.

    Args:
        epsilon: budget, greater than 0.
        delta: as in `privacy_spent`.
        tau: as there.
        rounds: as there.
        tolerance: how much less than `epsilon` it may be, relatively.

    Raises:
        ImportError: opacus is not installed.
    """
    _check(tau, rounds, delta)
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be greater than 0; got {epsilon!r}")
    low, high = 0.0, _SENSITIVITY * tau
    with warnings.catch_warnings():
        # Of noise that is too little: it is looked at on the way, and not returned.
        warnings.filterwarnings("ignore", "Optimal order is the smallest alpha", UserWarning)
        while privacy_spent(high, tau, rounds, delta) > epsilon:
            low, high = high, 2 * high
        while privacy_spent(high, tau, rounds, delta) < epsilon * (1 - tolerance):
            middle = (low + high) / 2
            if privacy_spent(middle, tau, rounds, delta) > epsilon:
                low = middle
            else:
                high = middle
    return high


def _check(tau: float, rounds: object, delta: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau must be greater than 0; got {tau!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer of at least 1; got {rounds!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1); got {delta!r}")


def _opacus() -> ModuleType:
    return needs("opacus.accountants", extra="dp")
