"""Tells parameters whose gradients somebody changes after backward: DDP's and FSDP's."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def manager_of(params: Iterable[Tensor]) -> str | None:
    """Who averages or shards the gradients of one of these parameters; None if nobody does.

    Sees DTensors (FSDP2, tensor parallelism), parameters that FSDP1 flattened, and those of every
    `DistributedDataParallel` that exists by now. Does not see all-reduces written by hand, nor a
    DDP that is made later.
    """
    params = list(params)
    # Where nobody imported it there are no DTensors, and importing it takes half a second.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is not None and any(isinstance(p, dtensor) for p in params):
        return "DTensor (FSDP2 or tensor parallelism)"
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        return "FullyShardedDataParallel"
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None  # DDP cannot be made without a process group
    own = {id(p) for p in params}
    ddp = nn.parallel.DistributedDataParallel
    for thing in gc.get_objects():
        if issubclass(type(thing), ddp) and any(id(p) in own for p in thing.parameters()):
            return "DistributedDataParallel"
    return None


def part_here(param: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, sharing memory; other tensors themselves."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is None or not isinstance(param, dtensor):
        return param
    local: Tensor = param._local_tensor.detach()
    return local


def refuse_managed(params: Iterable[Tensor], argument: str) -> None:
    """Raises ValueError where gradients are not final when backward has made them."""
    manager = manager_of(params)
    if manager is not None:
        raise ValueError(
            f"{argument} does not go with {manager}: it looks at gradients in backward, before "
            "they are reduced over the processes"
        )
