"""Ways to average gradients in DistributedDataParallel: torch's own, and pysmooth's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from pysmooth.compressors import QSGD, NaturalCompression, RandK, TopK
from pysmooth.distributed import (
    DCSGD,
    EF14,
    EF21,
    Clip21SGD2M,
    CompressedState,
    DSignSGD,
    MajorityVote,
    Method,
    TwoWaySign,
    compressed_hook,
)

Register = Callable[[DistributedDataParallel, torch.optim.Optimizer], object]


@dataclass(frozen=True)
class Contestant:
    """A hook, with the settings at which it trains.

    Args:
        register: gives a model its hook; None for no communication at all.
        lr_scale: times the training's learning rate.
        scheme: what the cost model calls it; None if it has no word for it.
        bucket_mb: DDP's `bucket_cap_mb`; None for its default.
    """

    register: Register | None
    lr_scale: float = 1.0
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


def _pysmooth(method: Method) -> Register:
    def register(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        state = CompressedState(model, optimizer, method, process_group=model.process_group)
        model.register_comm_hook(state, compressed_hook)

    return register


_TOP = TopK(ratio=0.01)

# torch's bf16 hook refuses every backend but NCCL's. PowerSGD starts its later phases from
# callbacks, which over gloo run in another order on every rank as soon as there are two buckets.
CONTESTANTS: dict[str, Contestant] = {
    "dense": Contestant(_dense, scheme="dense"),
    "torch fp16": Contestant(_torch_hook(default_hooks.fp16_compress_hook), scheme="bf16"),
    "torch PowerSGD, rank 1": Contestant(_power_sgd(1), bucket_mb=4096),
    "torch PowerSGD, rank 4": Contestant(_power_sgd(4), bucket_mb=4096),
    "sign, both ways, EF": Contestant(_pysmooth(TwoWaySign()), scheme="sign-ef"),
    "EF14 top-1 %": Contestant(_pysmooth(EF14(_TOP)), scheme="topk"),
    "EF21 top-1 %": Contestant(_pysmooth(EF21(_TOP)), scheme="topk"),
    "EF21-SGDM top-1 %": Contestant(_pysmooth(EF21(_TOP, eta=0.1)), scheme="topk"),
    "mean of signs": Contestant(_pysmooth(DSignSGD()), lr_scale=0.005, scheme="sign"),
    "majority vote": Contestant(_pysmooth(MajorityVote()), lr_scale=0.005),
    "rand-10 %": Contestant(_pysmooth(DCSGD(RandK(ratio=0.1)))),
    "QSGD, 15 levels": Contestant(_pysmooth(DCSGD(QSGD(levels=15, scope="block"))), scheme="qsgd"),
    "natural": Contestant(_pysmooth(DCSGD(NaturalCompression())), scheme="natural"),
    "Clip21-SGD2M": Contestant(_pysmooth(Clip21SGD2M(1.0, beta=0.1))),
}
