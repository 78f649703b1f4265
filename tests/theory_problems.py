"""What steps of the theory are tried on."""

from __future__ import annotations

import torch

BACKENDS = ("cpu", "eager")
# Of clipped SGD: smoothness, noise, distance, steps.
THEORY = {"L0": 4.0, "L1": 3.0, "sigma": 0.5, "R0": 2.0, "T": 100}


def quartic(x):
    return (x**2).sum() ** 2


def parabola(x):
    return (x**2).sum() / 2


def start(d=6):
    x = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return torch.nn.Parameter(x)


def backward(x, f=quartic):
    x.grad = None
    loss = f(x)
    loss.backward()
    return loss.detach()


def quartic_with_gradient(x):
    x.grad = None
    with torch.enable_grad():
        loss = quartic(x)
        loss.backward()
    return loss.detach()
