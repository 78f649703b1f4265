"""mean ||x - x_i||^4 over drawn points: the fourth-order problem of arXiv:2412.02781."""

from __future__ import annotations

import torch
from torch import Tensor

from pysmooth.federated import FunctionClient, Method, Server

from .outcome import Config, Curve
from .registry import need

OPTIMUM = {1: 2046.7670866252513, 100: 11235236.554068442}  # f*, by dimensions


def points(d: int) -> Tensor:
    """1,000 points, those of the authors' code."""
    drawn = need("numpy").random.RandomState(0).uniform(-10, 10, size=(1000, d))
    return torch.tensor(drawn)


def value(data: Tensor, x: Tensor) -> float:
    """F - f*."""
    return float((x - data).square().sum(1).square().mean()) - OPTIMUM[data.shape[1]]


def client(data: Tensor) -> FunctionClient:
    """Who has these points."""

    def grad(x: Tensor, batch: Tensor | None) -> Tensor:
        away = x - (data if batch is None else data[batch])
        return (4 * away * away.square().sum(1, keepdim=True)).mean(0)

    return FunctionClient(grad, len(data))


def clients(data: Tensor, count: int) -> dict[int, FunctionClient]:
    """Points by their norm, the nearest to 0 for the first client: as different as can be."""
    order = data.norm(dim=1).sort(stable=True).indices
    return {i: client(part) for i, part in enumerate(data[order].chunk(count))}


def race(
    config: Config,
    label: str,
    methods: list[Method],
    owners: dict[int, FunctionClient],
    data: Tensor,
    start: float,
    rounds: int,
    *,
    every: int = 1,
) -> Curve:
    """F - f* after each round, or every so many, of a run for each method of the list."""
    x = torch.full((data.shape[1],), start, dtype=torch.float64)
    values = []
    for run, method in enumerate(methods):
        server = Server(method, x)
        row = [value(data, x)]
        for i in config.steps(rounds, f"{label}, run {run + 1}"):
            server.round(owners)
            if (i + 1) % every == 0:
                row.append(value(data, server.x))
        values.append(row)
    places = [float(i) for i in range(0, rounds + 1, every)]
    return Curve(label, places, torch.tensor(values, dtype=torch.float64))
