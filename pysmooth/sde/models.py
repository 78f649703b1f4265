"""Drift and diffusion of the models. Time is t = k * lr; noise is independent per coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SDE:
    """dX = drift(X) dt + diffusion(X) dW, with a diagonal diffusion; X is (paths, d).

    Args:
        drift: of points (paths, d), of their shape.
        diffusion: of points likewise: the standard deviation of each coordinate.
    """

    drift: Field
    diffusion: Field


def dsgd(gradient: Field, lr: float, sigma: float, *, workers: int = 1) -> SDE:
    """Distributed SGD: drift -grad f, diffusion sqrt(lr / N) sigma.

    Args:
        gradient: grad f of points (paths, d).
        lr: step size, greater than 0.
        sigma: standard deviation of the noise per coordinate, at least 0.
        workers: N.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:2502.17009 (form as recalled, checked by simulation).
    """
    _check(lr, sigma, workers)
    size = math.sqrt(lr / workers) * sigma
    return SDE(lambda x: -gradient(x), lambda x: torch.full_like(x, size))


def dcsgd(gradient: Field, lr: float, sigma: float, omega: float, *, workers: int = 1) -> SDE:
    """Compressed SGD with scaled rand-k, whose omega is d / k - 1.

    Diffusion per coordinate sqrt(lr / N) sqrt(sigma^2 + omega (grad^2 + sigma^2)): a coordinate is
    sent, times 1 + omega, with probability 1 / (1 + omega). What sampling without replacement
    correlates between coordinates is left out.

    Args:
        gradient: grad f of points (paths, d).
        lr: step size, greater than 0.
        sigma: standard deviation of the noise per coordinate, at least 0.
        omega: the compressor's variance, at least 0.
        workers: N.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:2502.17009.
    """
    _check(lr, sigma, workers)
    if not omega >= 0:
        raise ValueError(f"omega must be at least 0; got {omega}")

    def diffusion(x: Tensor) -> Tensor:
        compressed = omega * (gradient(x) ** 2 + sigma**2)
        return (lr / workers * (sigma**2 + compressed)).sqrt()

    return SDE(lambda x: -gradient(x), diffusion)


def dsignsgd(
    gradient: Field, lr: float, sigma: float, *, nu: float = math.inf, workers: int = 1
) -> SDE:
    """Distributed sign SGD, which averages signs, under Student-t noise of scale sigma.

    With y = grad f / sigma and F the distribution function of t_nu: drift -(2 F(y) - 1), diffusion
    sqrt(lr / N) sqrt(1 - (2 F(y) - 1)^2). nu = inf: Gaussian, the drift being -erf(y / sqrt 2).

    Args:
        gradient: grad f of points (paths, d).
        lr: step size, greater than 0.
        sigma: scale of the noise per coordinate, greater than 0.
        nu: degrees of freedom. Others than 1, 2 and infinity need scipy:
            ``pip install 'pysmooth[bench]'``.
        workers: N.

    Raises:
        ImportError: scipy is needed, and not there.
        ValueError: a number is out of range.

    Source: arXiv:2502.17009, arXiv:2506.00181.
    """
    _check(lr, sigma, workers)
    if sigma == 0:
        raise ValueError("sigma must be greater than 0 for sign SGD")
    odd = _twice_distribution_less_one(nu)

    def diffusion(x: Tensor) -> Tensor:
        mean = odd(gradient(x) / sigma)
        return (lr / workers * (1 - mean**2).clamp_min(0)).sqrt()

    return SDE(lambda x: -odd(gradient(x) / sigma), diffusion)


def sgd_stability(
    gradient: Field, hessian_gradient: Field, lr: float, sigma: float, *, workers: int = 1
) -> SDE:
    """The model that sees SGD's stability threshold: drift -grad f + lr / 2 * H grad f.

    On a parabola of curvature lam it is stable where lr * lam < 2, as gradient descent is.

    Args:
        gradient: grad f.
        hessian_gradient: H(x) grad f(x).
        lr: step size.
        sigma: as in `dsgd`.
        workers: N.

    Source: arXiv:2506.00181 (from reviews of the later version).
    """
    plain = dsgd(gradient, lr, sigma, workers=workers)
    return SDE(lambda x: -gradient(x) + lr / 2 * hessian_gradient(x), plain.diffusion)


def sign_slope(nu: float = math.inf) -> float:
    """Twice the density of t_nu at 0: the slope of sign SGD's drift.

    Args:
        nu: degrees of freedom, greater than 0; infinity: a normal distribution.

    Raises:
        ValueError: an argument is out of range.
    """
    if not nu > 0:
        raise ValueError(f"nu must be greater than 0; got {nu}")
    if math.isinf(nu):
        return math.sqrt(2 / math.pi)
    log = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)
    return 2 * math.exp(log) / math.sqrt(math.pi * nu)


def stationary_variance(
    method: Literal["dsgd", "dcsgd", "dsignsgd"],
    lr: float,
    curvature: float,
    sigma: float,
    *,
    workers: int = 1,
    nu: float = math.inf,
    omega: float = 0.0,
) -> float:
    """Var of each coordinate on f = curvature / 2 * x^2, to first order in lr.

    DSGD: lr sigma^2 / (2 N curvature). DCSGD: the exact one of its SDE, lr (1 + omega) sigma^2 /
    (N (2 curvature - lr omega curvature^2 / N)). DSignSGD: lr sigma / (2 N slope curvature), finite
    also where the noise has no mean.

    Args:
        method: "dsgd", "dcsgd" or "dsignsgd".
        lr: step size, greater than 0.
        curvature: of the parabola, greater than 0.
        sigma: standard deviation of the noise per coordinate; for "dsignsgd" its scale.
        workers: N.
        nu: degrees of freedom, for "dsignsgd".
        omega: the compressor's variance, for "dcsgd".

    Raises:
        ValueError: an argument is out of range.
    """
    _check(lr, sigma, workers)
    if not curvature > 0:
        raise ValueError(f"curvature must be greater than 0; got {curvature}")
    if method == "dsgd":
        return lr * sigma**2 / (2 * workers * curvature)
    if method == "dsignsgd":
        return lr * sigma / (2 * workers * sign_slope(nu) * curvature)
    if method != "dcsgd":
        raise ValueError(f"method must be one of dsgd, dcsgd, dsignsgd; got {method!r}")
    below = workers * (2 * curvature - lr * omega * curvature**2 / workers)
    return lr * (1 + omega) * sigma**2 / below if below > 0 else math.inf


def _twice_distribution_less_one(nu: float) -> Field:
    sign_slope(nu)  # refuses what is no number of degrees of freedom
    if math.isinf(nu):
        return lambda y: torch.erf(y / math.sqrt(2))
    if nu == 1:
        return lambda y: 2 / math.pi * torch.atan(y)
    if nu == 2:
        return lambda y: y / (2 + y * y).sqrt()
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError(f"nu={nu} needs scipy: pip install 'pysmooth[bench]'") from error
    return lambda y: torch.as_tensor(2 * t.cdf(y.detach().numpy(), nu) - 1, dtype=y.dtype)


def _check(lr: float, sigma: float, workers: int) -> None:
    if not lr > 0:
        raise ValueError(f"lr must be greater than 0; got {lr}")
    if not sigma >= 0:
        raise ValueError(f"sigma must be at least 0; got {sigma}")
    if workers < 1 or workers != int(workers):
        raise ValueError(f"workers must be an integer of at least 1; got {workers!r}")
