"""FSDP2 within a group of processes, compressed means between groups: `set_all_reduce_hook`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .average import Averaging
from .kept import new_slot
from .method import Method
from .units import UnitwiseKept, common_group, names_of, other_groups, shard_numel, units_of


class AllReduceState(UnitwiseKept, Averaging):
    """What `compress_all_reduce` keeps: states of this rank's shards, staged as with DDP.

    Attributes and methods are those of `CompressedState`.

    Args:
        model: after `fully_shard`.
        optimizer: the one that steps it.
        method: what is sent.
        kwargs: the others of `compress_all_reduce`.

    Raises:
        ValueError, TypeError, MismatchError: as `compress_all_reduce` tells.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, **kwargs: Any
    ) -> None:
        self._units = units_of(model, method, "set_all_reduce_hook")
        group = kwargs["process_group"] or dist.group.WORLD
        shard_group = common_group(self._units)
        shards, shard = dist.get_world_size(shard_group), dist.get_rank(shard_group)
        within = set(dist.get_process_group_ranks(shard_group))
        ranks = dist.get_process_group_ranks(group)
        both = within & set(ranks)
        if both != {dist.get_rank()}:
            raise ValueError(
                f"process_group has ranks {sorted(both)} in common with those over which "
                "parameters are sharded; it has to be of the ranks with the same shards"
            )
        for unit in self._units:
            if unit.replicas is None:
                if unit.states[0] is not None:
                    raise ValueError(
                        "compress_all_reduce behind compress_reduce_scatter needs fully_shard with "
                        "a mesh of two dimensions: only then do both drop the same steps"
                    )
                continue
            theirs = dist.get_process_group_ranks(unit.replicas)
            if theirs != ranks:
                raise ValueError(
                    f"process_group has ranks {ranks}, and FSDP module {unit.name!r} has its "
                    f"replicas on {theirs}: give it the mesh's group of that dimension"
                )
        names, about, found = names_of(model), {}, []
        for unit in self._units:
            for p in unit.params:
                index, name = names[id(p.sharded_param)]
                numel = shard_numel(p, shard, shards)
                slot = new_slot(name, index, p.sharded_param, numel)
                unit.slots[slot.owner, shard] = slot
                found.append(slot)
                whole = f"{p.sharded_param.dtype} of shape {tuple(p.sharded_param.shape)}"
                about[f"parameter {name!r}"] = f"{whole}, {numel} elements in shard {shard}"
        super().__init__(found, about, optimizer, method, **kwargs)
        self._shard = shard
        self._know(other_groups(self._units, group))
        for index, unit in enumerate(self._units):
            if unit.replicas is not None:
                unit.leave_replicas()
            unit.module.set_all_reduce_hook(partial(self._reduce, index))

    @torch.no_grad()
    def _reduce(self, index: int, buffer: Tensor) -> None:
        unit = self._units[index]
        self._arrived(index, unit)
        try:
            pieces, end = unit.pieces(self._shard)
            unit.check(buffer, end)
            self._average([self._job(f"module {unit.name!r}", buffer, pieces)])
        except BaseException:
            self._failed = True
            raise
        self._complete = True


def compress_all_reduce(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    *,
    process_group: Any,
    dense_below: int = 1024,
    warmup_steps: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> AllReduceState:
    """Compresses what hybrid sharding sends between its groups, the slow way as a rule.

    ::

        mesh = init_device_mesh("cuda", (nodes, 8), mesh_dim_names=("outer", "inner"))
        fully_shard(model, mesh=mesh["inner"])
        optimizer = ...
        state = compress_all_reduce(
            model, optimizer, EF14(TopK(ratio=0.01)), process_group=mesh.get_group("outer")
        )

    FSDP2 averages over the inner ranks as always; the method then averages each shard over the
    ranks that hold the same one. `fully_shard` may have both dimensions of the mesh, too (HSDP):
    its own mean over replicas is then left out. Modules may be tensor-parallel. Messages, scales
    and selections are about shards; states are as long as shards.
    `FSDPModule.set_requires_gradient_sync(False)` accumulates, as without it. Until the first
    backward `optimizer` must have the sharded parameters.

    Args:
        model: after `fully_shard`, of it or of modules in it.
        optimizer: the one that steps it; its learning rates are read in every backward.
        method: what is sent: `EF14`, `EF21`, `TwoWaySign` ...; not `Clip21SGD2M`, which needs all
            gradients at once.
        process_group: of the ranks that hold the same shards.
        dense_below: shards of fewer elements are averaged as they are.
        warmup_steps: so many first steps average everything as it is.
        scaler: a `torch.amp.GradScaler`: what is kept and sent is then in units without its scale.

    Returns:
        The state: `state_dict` and `load_state_dict`, `steps`, `dropped`, `sent_bytes`.

    Raises:
        ValueError: an argument is out of range; groups overlap; FSDP2 has its replicas elsewhere.
        TypeError: an argument has the wrong type, or the model no module of FSDP2.
        MismatchError: in the first backward: ranks were set up differently.
    """
    return AllReduceState(
        model,
        optimizer,
        method,
        process_group=process_group,
        dense_below=dense_below,
        warmup_steps=warmup_steps,
        scaler=scaler,
    )
