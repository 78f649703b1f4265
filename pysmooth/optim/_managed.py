"""Tells who else has a hand in an optimizer's gradients or parameters: DDP, FSDP, ZeRO."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from traceback import walk_stack

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


def refuse_zero() -> None:
    """Raises ValueError where ZeroRedundancyOptimizer is about to make its local optimizer.

    That one gets some of the parameters as plain tensors, and nothing in them says so; but it is
    constructed by a method of a ZeroRedundancyOptimizer, which is then on the stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    for frame, _ in walk_stack(None):
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise ValueError(
                "pysmooth's optimizers do not go into ZeroRedundancyOptimizer, which gives each "
                "process some of the parameters: norms would be local. Use fully_shard (FSDP2)"
            )
