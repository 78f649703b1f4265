"""The formulas of all methods, for workers simulated in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysmooth import compressors
from pysmooth.distributed import DCSGD, EF14, EF21, Clip21SGD2M, Method
from pysmooth.distributed.signs import share_of
from pysmooth.reference.random import normal


class Workers:
    """The formulas of a method, for workers in one process, a list of flat tensors for each."""

    def __init__(self, method: Method, ranks: int, like: list[Tensor]) -> None:
        self.method, self.ranks = method, ranks
        zeros = [[torch.zeros_like(x) for x in like] for _ in range(ranks)]
        self.e, self.m, self.m2, self.h = (
            [[x.clone() for x in row] for row in zeros] for _ in range(4)
        )
        self.server = [torch.zeros_like(x) for x in like]
        self.steps = 0

    def _compress(self, rank: int, i: int, x: Tensor) -> Tensor:
        c: Any = self.method.compressor  # type: ignore[attr-defined]
        if hasattr(c, "seed"):
            seed = (c.seed + rank * 0x9E3779B97F4A7C15) % 2**64
            c = type(c)(**{**vars(c), "seed": seed})
        out: Tensor = c(x, step=self.steps, tensor_id=i)
        return out

    def average(self, grads: list[list[Tensor]], lr: float) -> list[Tensor]:
        """What every worker steps with."""
        found = [self._one(i, [g[i] for g in grads], lr) for i in range(len(self.server))]
        self.steps += 1
        return found

    def _mean(self, sent: list[Tensor]) -> Tensor:
        total = torch.zeros_like(sent[0])
        for x in sent:
            total += x
        return total / self.ranks

    def _momentum(self, rank: int, i: int, g: Tensor) -> Tensor:
        method = self.method
        assert isinstance(method, EF21)
        if method.eta is None:
            return g
        for store in (self.m, self.m2)[: method.momenta]:
            first = self.steps == 0 and method.init != "zero"
            m = store[rank][i]
            store[rank][i] = g = g if first else (1 - method.eta) * m + method.eta * g
        return g

    def _one(self, i: int, grads: list[Tensor], lr: float) -> Tensor:
        method, ranks = self.method, range(self.ranks)
        name = type(method).__name__
        if grads[0].numel() < 8:
            return self._mean(grads)
        signs = [torch.where(g >= 0, 1.0, -1.0) for g in grads]
        if name == "DSignSGD":
            return self._mean(signs)
        if name == "MajorityVote":
            return torch.where(sum(signs) >= 0, 1.0, -1.0)  # type: ignore[operator]
        if isinstance(method, DCSGD):
            return self._mean([self._compress(r, i, grads[r]) for r in ranks])
        if isinstance(method, EF14):
            sent = []
            for r in ranks:
                self.m[r][i] = method.momentum * self.m[r][i] + grads[r]
                x = self.e[r][i] + lr * self.m[r][i]
                sent.append(self._compress(r, i, x))
                self.e[r][i] = x - sent[-1]
            return self._mean(sent) / lr
        if name == "TwoWaySign":
            sign = compressors.ScaledSign()
            sent = []
            for r in ranks:
                x = self.e[r][i] + lr * grads[r]
                sent.append(sign(x))
                self.e[r][i] = x - sent[-1]
            y = self.server[i] + self._mean(sent)
            share = share_of(len(y), self.ranks)
            out = torch.cat([sign(piece) for piece in y.split(share)])
            self.server[i] = y - out
            return out / lr
        if isinstance(method, EF21):
            changes = []
            for r in ranks:
                v = self._momentum(r, i, grads[r])
                full = method.init == "full" and self.steps == 0
                c = v if full else self._compress(r, i, v - self.h[r][i])
                self.h[r][i] = self.h[r][i] + c
                changes.append(c)
            self.server[i] = self.server[i] + self._mean(changes)
            return self.server[i]
        raise AssertionError(name)


class Clipping(Workers):
    """Clip21 looks at all tensors together."""

    def average(self, grads: list[list[Tensor]], lr: float) -> list[Tensor]:
        """What every worker steps with."""
        method = self.method
        assert isinstance(method, Clip21SGD2M)
        coded = [i for i in range(len(self.server)) if self.server[i].numel() >= 8]
        sent: list[list[Tensor]] = [[] for _ in self.server]
        for r in range(self.ranks):
            for i in coded:
                self.m[r][i] = (1 - method.beta) * self.m[r][i] + method.beta * grads[r][i]
            change = {i: self.m[r][i] - self.h[r][i] for i in coded}
            norm = torch.cat([change[i].double() for i in coded]).norm()
            coef = min(1.0, method.tau / float(norm))
            for i in coded:
                u = change[i] * coef
                self.h[r][i] = self.h[r][i] + method.beta_hat * u
                seed = (method.seed + r * 0x9E3779B97F4A7C15) % 2**64
                drawn = normal(len(u), seed=seed, step=self.steps, tensor_id=i)
                sent[i].append(u + method.noise_std * drawn)
        for i in coded:
            self.server[i] = self.server[i] + method.beta_hat * self._mean(sent[i])
        self.steps += 1
        means = [self._mean([g[i] for g in grads]) for i in range(len(self.server))]
        return [self.server[i] if i in coded else means[i] for i in range(len(self.server))]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=tolerance)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
