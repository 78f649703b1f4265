"""The clients' side: gradients at a point, and what a client does between two messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .draws import permutation


class Client(Protocol):
    """Who has data. `ModelClient` is one; so is any object with these two."""

    samples: int

    def grad(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """The mean gradient at x over the samples `batch` (their numbers), or over all."""
        ...


@dataclass(frozen=True)
class Task:
    """What a client is asked.

    Args:
        client: its number.
        round: rounds that the server has finished.
        taken: the last round in which an answer of this client was taken in, or -1. An answer that
            came too late was not.
    """

    client: int
    round: int
    taken: int = -1


@dataclass
class FunctionClient:
    """A client of a function.

    Args:
        gradient: `gradient(x, batch)`, as `grad` of any client.
        samples: how many it has.
    """

    gradient: Callable[[Tensor, Tensor | None], Tensor]
    samples: int = 1

    def grad(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """The function's value."""
        return self.gradient(x, batch)


class ModelClient:
    """A client with a torch model and labelled data.

    Args:
        model: its parameters are overwritten by those that are sent.
        loss: `loss(model(inputs), targets)`, a mean over samples.
        inputs: one row for each sample.
        targets: as many.

    Raises:
        ValueError: not as many, or none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
    ) -> None:
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise ValueError(f"{len(inputs)} inputs, {len(targets)} targets")
        self.model, self.loss, self.inputs, self.targets = model, loss, inputs, targets
        self.samples = len(inputs)
        self._params = [p for p in model.parameters() if p.requires_grad]

    def vector(self) -> Tensor:
        """The parameters as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self._params])

    @torch.no_grad()
    def load(self, x: Tensor) -> None:
        """Sets the parameters from a vector."""
        size = sum(p.numel() for p in self._params)
        if x.shape != (size,):
            raise ValueError(f"x must be a vector of {size} numbers; got {tuple(x.shape)}")
        at = 0
        for p in self._params:
            p.copy_(x[at : at + p.numel()].view_as(p))
            at += p.numel()

    def grad(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """The gradient of the mean loss over the batch."""
        self.load(x)
        inputs, targets = self.inputs, self.targets
        if batch is not None:
            inputs, targets = inputs[batch], targets[batch]
        with torch.enable_grad():
            value = self.loss(self.model(inputs), targets)
            grads = torch.autograd.grad(
                value, self._params, allow_unused=True, materialize_grads=True
            )
        return torch.cat([g.reshape(-1) for g in grads])


Batch = Tensor | None  # numbers of samples; None: all


def shuffled(
    client: Client, batch_size: int | None, *, seed: int, epoch: int, who: int
) -> list[Batch]:
    """The batches of one epoch over a client's samples, in an order of its own.

    The order depends on seed, epoch and client alone: nothing has to be saved for it.
    """
    if batch_size is None or batch_size >= client.samples:
        return [None]
    order = permutation(client.samples, client.samples, seed=seed, step=epoch, tensor_id=who)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def drawn(
    client: Client, batch_size: int | None, steps: int, *, seed: int, first: int, who: int
) -> list[Batch]:
    """As many batches, each drawn without replacement; all samples where they are no more."""
    if batch_size is None or batch_size >= client.samples:
        return [None] * steps
    return [
        permutation(batch_size, client.samples, seed=seed, step=first + i, tensor_id=who)
        for i in range(steps)
    ]


def descend(
    client: Client, x: Tensor, batches: Sequence[Batch], step_size: Callable[[Tensor], float]
) -> tuple[Tensor, Tensor]:
    """Walks from x along gradients of the batches.

    Equivalent to::

        y = x.clone()
        for batch in batches:
            g = client.grad(y, batch)
            y -= step_size(g) * g
        return <mean of g, by batch sizes>, x - y

    where both are summed up on their own: with tiny steps nothing is left of x - y.
    """
    sizes = [client.samples if batch is None else len(batch) for batch in batches]
    y, mean, moved = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for batch, size in zip(batches, sizes, strict=True):
        g = client.grad(y, batch)
        step = g * step_size(g)
        y -= step
        moved += step
        mean += g * (size / sum(sizes))
    return mean, moved
