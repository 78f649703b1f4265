"""Clip21-SGD2M: what is sent is the clipped change of an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.random import normal
from .codec import all_finite
from .method import Context, Method, Slot
from .wire import floats, raw, seed_of


@dataclass(frozen=True)
class Clip21SGD2M(Method):
    r"""Clip21 with momentum on workers and a damped server, and noise for local privacy.

    ::

        Worker i:  v_i = (1 - beta) * v_i + beta * g_i
                   u_i = clip_tau(v_i - g^_i),  sends c_i = u_i + noise_i,  g^_i += beta_hat * u_i
        all:       g^ += beta_hat * mean_i c_i;  step with g^

    clip_tau(u) = min(1, tau / \|\|u\|\|) * u, over all parameters together, so that nothing is sent
    before backward is done; 32 d bits per rank: clipping is not compression. The worker's own copy
    stays free of noise. No privacy budget is counted here.

    Args:
        tau: clipping threshold, greater than 0.
        beta: weight of the new gradient in the momentum, in (0, 1].
        beta_hat: step of the estimates, in (0, 1].
        noise_std: standard deviation of the noise per coordinate, at least 0.
        seed: of the noise; ranks draw independently.

    States: `momentum_buffer`, `grad_estimate` and `server_estimate`; 8 bytes per parameter each,
    since a step's changes are staged. Source: arXiv:2502.11682.
    """

    tau: float
    beta: float = 0.1
    beta_hat: float = 1.0
    noise_std: float = 0.0
    seed: int = 0

    joint = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau must be greater than 0; got {self.tau!r}")
        for name in ("beta", "beta_hat"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {getattr(self, name)!r}")
        if not (self.noise_std >= 0 and math.isfinite(self.noise_std)):
            raise ValueError(f"noise_std must be at least 0; got {self.noise_std!r}")

    def size(self, d: int, ranks: int) -> int:
        """32 bits per number."""
        return 4 * d

    def prepare(self, context: Context, grads: list[tuple[Slot, Tensor]]) -> None:
        """Momenta, and the changes clipped by the norm of all of them together."""
        squares = []
        for slot, grad in grads:
            kept = slot.state("momentum_buffer")
            v = slot.stage("momentum_buffer").copy_(kept).mul_(1 - self.beta)
            v.add_(grad, alpha=self.beta)
            estimate = slot.state("grad_estimate")
            change = torch.sub(v, estimate, out=slot.stage("grad_estimate"))
            squares.append(change.double().square().sum())
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        coef = torch.where(norm > self.tau, self.tau / norm, 1.0).float()
        for slot, _ in grads:
            slot.staged["grad_estimate"].mul_(coef)

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """The clipped change, with noise; without it, it enters the worker's estimate."""
        change = slot.staged["grad_estimate"]
        finite = all_finite(change)
        sent = change
        if self.noise_std > 0:
            seed = seed_of(self.seed, context.rank)
            drawn = normal(len(grad), seed=seed, step=context.step, tensor_id=slot.index)
            sent = change + self.noise_std * drawn.to(change.device)
        message.copy_(raw(sent))
        change.mul_(self.beta_hat).add_(slot.state("grad_estimate"))
        return finite

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """The server's estimate."""
        out.zero_()
        for message in messages:
            out += floats(message)
        out.mul_(self.beta_hat / context.ranks).add_(slot.state("server_estimate"))
        slot.stage("server_estimate").copy_(out)

    def regroup(self, slot: Slot) -> None:
        """Every worker's estimate becomes the server's; momenta start anew."""
        kept = slot.states.get("server_estimate")
        slot.states.clear()
        if kept is not None:
            slot.states = {"grad_estimate": kept.clone(), "server_estimate": kept}
