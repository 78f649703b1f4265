"""Clip21: what is clipped is the distance between the gradient and an estimate of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import ClipSpec, Recipe, Scope
from ._base import FusedOptimizer, check_scope
from ._clip import Norm, ScopeName
from ._precision import Precision
from ._residual import ResidualPolicy, floats, halves
from ._validate import check_flag, check_number, check_seed


class Clip21SGD2M(FusedOptimizer):
    """Clip21-SGD2M on one worker: clipping with error feedback and two momenta.

    Equivalent to::

        for p in params:
            momentum_buffer = (1 - beta) * momentum_buffer + beta * p.grad
            distance = momentum_buffer - grad_estimate
        norm = norm of all distances                 # scope="global"; or per group, or per tensor
        for p in params:
            u = distance * min(1, tau / norm)
            grad_estimate = grad_estimate + beta_hat * u
            p = p - lr * weight_decay * p - lr * grad_estimate

    Unlike a clipped gradient the estimate has no bias that stays: once the distances are shorter
    than `tau` nothing is clipped, whatever `tau` is. `tau=inf, beta_hat=1` is SGD with momentum
    `1 - beta`, with `beta=1` as well plain SGD.

    With `noise_std` the server's copy of the estimate, which the parameter follows, also receives
    `beta_hat` times Gaussian noise in every step, as for differential privacy; the worker's own
    stays free of it. It is a state more, `server_estimate`, and server_estimate - grad_estimate is
    beta_hat times the sum of the noise. No privacy budget is counted here. The noise is drawn in
    float32 whatever the parameter's dtype is, and is the same on every backend.

    State: `grad_estimate` and `momentum_buffer`, and `server_estimate` with noise; they start from
    0. Each takes 4 bytes per parameter (float32 also for 16-bit parameters), 8 for float64.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: step size, at least 0.
        tau: clipping threshold, greater than 0.
        beta: weight of the new gradient in the momentum, in (0, 1].
        beta_hat: step of the estimate, in (0, 1].
        noise_std: standard deviation of the noise per coordinate, at least 0.
        seed: of the noise, which depends on it, the step and the coordinate alone.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay`, times itself.
        scope: over what the norm is taken: "global" (all groups together), "group" or "tensor".
        maximize: ascend instead of descend.
        nonfinite: what to do where a gradient is not finite: "skip" the step (it is counted),
        "raise"
            `NonFiniteGradientError`, or take such coordinates as "zero". The first two read all
            gradients once more.
        norm: "in_backward": whether gradients are finite is seen in backward, as in
            `pysmooth.ClipSGD`, and the step need not read them for it.
        backend: "auto", "cpu" or "eager".
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2502.11682.
    """

    groups_say_all = True

    policies = ("skip", "raise", "zero")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        tau: float = 1.0,
        beta: float = 0.1,
        beta_hat: float = 1.0,
        noise_std: float = 0.0,
        *,
        seed: int = 0,
        weight_decay: float = 0.0,
        scope: ScopeName = "global",
        maximize: bool = False,
        nonfinite: ResidualPolicy = "skip",
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.stage_scopes = (check_scope(scope), Scope.GLOBAL)
        defaults = {
            "seed": seed,
            "lr": lr,
            "tau": tau,
            "beta": beta,
            "beta_hat": beta_hat,
            "noise_std": noise_std,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            scope=scope,
            nonfinite=nonfinite,
            norm_type=2.0,
            norm=norm,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        _check(group)
        for name in ("beta", "beta_hat"):
            if check_number(name, group[name], strict=True) > 1:
                raise ValueError(f"{name} must be in (0, 1]; got {float(group[name])}")

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        return _recipe(group, "clip21_sgd2m", "grad_estimate", "momentum_buffer")


class Clip21(FusedOptimizer):
    """Clip21 on one worker: gradient descent along an estimate that follows the gradient, clipped.

    Equivalent to::

        distance = p.grad - grad_estimate            # for all parameters
        norm = norm of all distances                 # scope="global"; or per group, or per tensor
        for p in params:
            grad_estimate = grad_estimate + distance * min(1, tau / norm)
            p = p - lr * weight_decay * p - lr * grad_estimate

    For gradients without noise: with noise it need not converge, and `Clip21SGD2M` is the cure. It
    is EF21 with the clip for a compressor. Once distances are shorter than `tau` it is gradient
    descent.

    With `noise_std` the parameter follows `server_estimate`, which also receives Gaussian noise, as
    in `Clip21SGD2M`: the same as that class with `beta=1, beta_hat=1`, without its momentum.

    State: `grad_estimate`, and `server_estimate` with noise; they start from 0. Each takes 4 bytes
    per parameter (float32 also for 16-bit parameters), 8 for float64.

    Args:
        params, lr, tau, noise_std, seed, weight_decay, scope, maximize, nonfinite, norm, backend:
            as in `Clip21SGD2M`.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2305.18929.
    """

    groups_say_all = True

    policies = ("skip", "raise", "zero")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        tau: float = 1.0,
        noise_std: float = 0.0,
        *,
        seed: int = 0,
        weight_decay: float = 0.0,
        scope: ScopeName = "global",
        maximize: bool = False,
        nonfinite: ResidualPolicy = "skip",
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.stage_scopes = (check_scope(scope), Scope.GLOBAL)
        defaults = {
            "seed": seed,
            "lr": lr,
            "tau": tau,
            "noise_std": noise_std,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            scope=scope,
            nonfinite=nonfinite,
            norm_type=2.0,
            norm=norm,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        _check(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        return _recipe({**group, "beta": 1.0, "beta_hat": 1.0}, "clip21", "grad_estimate")


def _check(group: dict[str, Any]) -> None:
    check_number("lr", group["lr"])
    check_number("weight_decay", group["weight_decay"])
    check_number("tau", group["tau"], strict=True, infinite=True)
    check_number("noise_std", group["noise_std"])
    check_seed("seed", group["seed"])
    check_flag("maximize", group["maximize"])


def _recipe(group: dict[str, Any], rule: str, *states: str, noisy: bool = False) -> Recipe:
    """Noise is drawn by step, and makes the server's estimate a state of its own."""
    hyper = floats(group, "lr", "tau", "beta", "beta_hat", "weight_decay", "noise_std")
    hyper += halves(int(group["seed"]))
    clip = ClipSpec(maximize=group["maximize"])
    if group["noise_std"] == 0 and not noisy:
        return Recipe(rule, hyper, states, clip)
    return Recipe(f"{rule}_noise", hyper, (*states, "server_estimate"), clip, counts_steps=True)
