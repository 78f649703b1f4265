"""The SDE models against the discrete methods, and against their closed forms."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from pysmooth import RandK
from pysmooth.optim import ClipSGD, SignSGD
from pysmooth.sde import dcsgd, dsgd, dsignsgd, euler_maruyama, sgd_stability, stationary_variance

LR, PATHS = 0.05, 4000


def identity(x):
    return x


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (dsgd, {}),
        (dsignsgd, {}),
        (dsignsgd, {"nu": 1.0}),
        (dsignsgd, {"nu": 2.0}),
        (dcsgd, {"omega": 3.0}),
    ],
)
def test_stationary_variance_of_the_simulation(make, kwargs):
    want = stationary_variance(make.__name__, LR, 1.0, 2.0, workers=8, **kwargs)
    sde = make(identity, LR, 2.0, workers=8, **kwargs)
    paths = euler_maruyama(sde, torch.zeros(PATHS, dtype=torch.float64).view(-1, 1), 12.0, 240)
    assert float(paths.var()) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("nu", [1.0, math.inf])
def test_sign_sgd_itself_has_the_models_variance(nu):
    n, sigma = 8, 1.0
    generator = torch.Generator().manual_seed(1)
    replicas = [torch.nn.Parameter(torch.zeros(PATHS)) for _ in range(n)]
    optimizer = SignSGD(replicas, LR)
    for _ in range(300):
        for p in replicas:
            noise = torch.randn(PATHS, generator=generator)
            if nu == 1.0:
                noise = noise / torch.randn(PATHS, generator=generator)
            p.grad = p.detach() + sigma * noise
        optimizer.step()
        with torch.no_grad():  # the server: signs are averaged
            mean = torch.stack([p.detach() for p in replicas]).mean(0)
            for p in replicas:
                p.copy_(mean)
    want = stationary_variance("dsignsgd", LR, 1.0, sigma, workers=n, nu=nu)
    assert float(mean.var()) == pytest.approx(want, rel=0.1)


def test_compressed_sgd_itself_has_the_models_variance():
    n, d, sigma = 4, 4000, 1.0
    generator = torch.Generator().manual_seed(1)
    x = torch.nn.Parameter(torch.zeros(d))
    optimizer = ClipSGD([x], LR)
    for step in range(120):
        sent = [
            RandK(ratio=0.25, seed=i)(
                x.detach() + sigma * torch.randn(d, generator=generator), step=step
            )
            for i in range(n)
        ]
        x.grad = torch.stack(sent).mean(0)
        optimizer.step()
    want = stationary_variance("dcsgd", LR, 1.0, sigma, workers=n, omega=3.0)
    assert float(x.detach().var()) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize(("lr", "stable"), [(1.9, True), (2.1, False)])
def test_stability_threshold_of_gradient_descent(lr, stable):
    x = torch.ones(1, 1, dtype=torch.float64)
    sde = sgd_stability(identity, identity, lr, 0.0)
    end = float(euler_maruyama(sde, x, 20.0, 2000).abs())
    assert (end < 1) is stable
    plain = float(euler_maruyama(dsgd(identity, lr, 0.0), x, 20.0, 2000).abs())
    assert plain < 1e-8  # the classic model sees no threshold


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dsgd(identity, 0.0, 1.0), "lr"),
        (lambda: dsgd(identity, 0.1, -1.0), "sigma"),
        (lambda: dsgd(identity, 0.1, 1.0, workers=0), "workers"),
        (lambda: dcsgd(identity, 0.1, 1.0, math.nan), "omega"),
        (lambda: dsignsgd(identity, 0.1, 0.0), "sigma"),
        (lambda: dsignsgd(identity, 0.1, 1.0, nu=-1.0), "nu"),
        (lambda: stationary_variance("sgd", 0.1, 1.0, 1.0), "method"),
        (lambda: stationary_variance("dsgd", 0.1, 0.0, 1.0), "curvature"),
        (lambda: euler_maruyama(dsgd(identity, 0.1, 1.0), torch.ones(2), 1.0, 10), "start"),
        (lambda: euler_maruyama(dsgd(identity, 0.1, 1.0), torch.ones(2, 1), 1.0, 0), "steps"),
        (lambda: euler_maruyama(dsgd(identity, 0.1, 1.0), torch.ones(2, 1), 0.0, 9), "time"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_all_points_of_a_path_end_where_its_last_one_is():
    sde, start = dsgd(identity, 0.1, 1.0), torch.ones(3, 1, dtype=torch.float64)
    path = euler_maruyama(sde, start, 1.0, 5, seed=7, keep=True)
    assert path.shape == (6, 3, 1)
    assert torch.equal(path[0], start)
    assert torch.equal(path[-1], euler_maruyama(sde, start, 1.0, 5, seed=7))


def test_signs_of_noise_with_other_degrees_of_freedom():
    """Between those that have a formula, and symmetric."""
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).view(-1, 1)
    one, some, two = (-dsignsgd(identity, 0.1, 1.0, nu=nu).drift(x) for nu in (1.0, 1.5, 2.0))
    torch.testing.assert_close(some, -some.flip(0))
    ends = one[4:], two[4:]
    assert bool(((some[4:] - ends[0]) * (some[4:] - ends[1]) < 0).all())


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"nu=1.5 needs scipy.*pysmooth\[bench\]"):
        dsignsgd(identity, 0.1, 1.0, nu=1.5)
