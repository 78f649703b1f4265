"""Ways to average gradients in DistributedDataParallel: torch's own, and pysmooth's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

Register = Callable[[DistributedDataParallel, torch.optim.Optimizer], object]


@dataclass(frozen=True)
class Contestant:
    """A hook, with the settings at which it trains.

    Args:
        register: gives a model its hook; None for no communication at all.
        lr_scale: times the training's learning rate.
        momentum: of SGD after the hook.
        scheme: what the cost model calls it; None if it has no word for it.
        bucket_mb: DDP's `bucket_cap_mb`; None for its default.
    """

    register: Register | None
    lr_scale: float = 1.0
    momentum: float = 0.9
    scheme: str | None = None
    bucket_mb: int | None = None


def _dense(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    pass


def _torch_hook(hook: Callable[..., object]) -> Register:
    return lambda model, optimizer: model.register_comm_hook(model.process_group, hook)


def _power_sgd(rank: int) -> Register:
    def register(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        state = powerSGD_hook.PowerSGDState(
            model.process_group, matrix_approximation_rank=rank, start_powerSGD_iter=2
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return register


# torch's bf16 hook refuses every backend but NCCL's. PowerSGD starts its later phases from
# callbacks, which over gloo run in another order on every rank as soon as there are two buckets.
CONTESTANTS: dict[str, Contestant] = {
    "dense": Contestant(_dense, scheme="dense"),
    "torch fp16": Contestant(_torch_hook(default_hooks.fp16_compress_hook), scheme="bf16"),
    "torch PowerSGD, rank 1": Contestant(_power_sgd(1), bucket_mb=4096),
    "torch PowerSGD, rank 4": Contestant(_power_sgd(4), bucket_mb=4096),
}
