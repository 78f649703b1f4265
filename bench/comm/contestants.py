"""Ways to average gradients in DistributedDataParallel: torch's own, and pysmooth's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
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
        method: pysmooth's, where it is one of ours.
    """

    register: Register | None
    lr_scale: float = 1.0
    scheme: str | None = None
    bucket_mb: int | None = None
    method: Method | None = None


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


class TimedState(CompressedState):
    """A hook's state that counts what its threads work: seconds of CPU, none of which wait."""

    _called = _worked = 0.0  # each of one thread

    def reduce(self, bucket: Any) -> Future[Tensor]:
        """The hook, in backward's thread."""
        start = time.thread_time()
        try:
            return super().reduce(bucket)
        finally:
            self._called += time.thread_time() - start

    def _work(self, jobs: Any) -> None:
        start = time.thread_time()
        super()._work(jobs)
        self._worked += time.thread_time() - start

    def take_seconds(self) -> float:
        """What was worked since this was asked last."""
        seconds, self._called, self._worked = self._called + self._worked, 0.0, 0.0
        return seconds


def _pysmooth(method: Method, dense_below: int = 1024) -> Register:
    def register(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> TimedState:
        group = model.process_group
        state = TimedState(model, optimizer, method, process_group=group, dense_below=dense_below)
        model.register_comm_hook(state, compressed_hook)
        return state

    return register


def _ours(method: Method, lr_scale: float = 1.0, scheme: str | None = None) -> Contestant:
    return Contestant(_pysmooth(method), lr_scale, scheme, method=method)


_TOP = TopK(ratio=0.01)

# torch's bf16 hook refuses every backend but NCCL's. PowerSGD starts its later phases from
# callbacks, which over gloo run in another order on every rank as soon as there are two buckets.
CONTESTANTS: dict[str, Contestant] = {
    "dense": Contestant(_dense, scheme="dense"),
    "torch fp16": Contestant(_torch_hook(default_hooks.fp16_compress_hook), scheme="bf16"),
    "torch PowerSGD, rank 1": Contestant(_power_sgd(1), bucket_mb=4096),
    "torch PowerSGD, rank 4": Contestant(_power_sgd(4), bucket_mb=4096),
    "sign, both ways, EF": _ours(TwoWaySign(), scheme="sign-ef"),
    "EF14 top-1 %": _ours(EF14(_TOP), scheme="topk"),
    "EF21 top-1 %": _ours(EF21(_TOP), scheme="topk"),
    "EF21-SGDM top-1 %": _ours(EF21(_TOP, eta=0.1), scheme="topk"),
    "mean of signs": _ours(DSignSGD(), lr_scale=0.005, scheme="sign"),
    "majority vote": _ours(MajorityVote(), lr_scale=0.005),
    "rand-10 %": _ours(DCSGD(RandK(ratio=0.1))),
    "QSGD, 15 levels": _ours(DCSGD(QSGD(levels=15, scope="block")), scheme="qsgd"),
    "natural": _ours(DCSGD(NaturalCompression()), scheme="natural"),
    "Clip21-SGD2M": _ours(Clip21SGD2M(1.0, beta=0.1)),
}

_DENSE_BELOW = ", dense below "


def contestant(name: str) -> Contestant:
    """The one of that name; "<name>, dense below <n>" is one of ours with that `dense_below`.

    Raises:
        KeyError: there is none.
    """
    plain, found, numel = name.partition(_DENSE_BELOW)
    entry = CONTESTANTS[plain]
    if not found:
        return entry
    if entry.method is None:
        raise KeyError(f"{plain} has no dense_below")
    return replace(entry, register=_pysmooth(entry.method, dense_below=int(numel)))


def with_dense_below(name: str, numel: int) -> str:
    """The name of a contestant with that `dense_below`."""
    return f"{name}{_DENSE_BELOW}{numel}"
