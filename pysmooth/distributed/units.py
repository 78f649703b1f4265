"""The units in which FSDP2 reduces gradients, and where whose shards lie in its buffers.

`fully_shard` tells a hook neither; the order of parameters and their padding are read from it here,
and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .exchange import mesh_groups
from .kept import Kept
from .method import Method, Slot


@dataclass
class Unit:
    """A module that `fully_shard` was called with, and its parameters."""

    name: str
    module: Any
    group: Any  # torch's FSDPParamGroup
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)  # by parameter and shard

    @property
    def params(self) -> list[Any]:
        """Torch's FSDPParam of each parameter that gets gradients, in the order of buffers."""
        return [p for p in self.group.fsdp_params if p.sharded_param.requires_grad]

    def pieces(self, shard: int, begin: int = 0) -> tuple[list[tuple[Slot, int]], int]:
        """Where a shard of each begins in a buffer, and where they all end."""
        found = []
        for p in self.params:
            slot = self.slots.get((id(p.sharded_param), shard))
            if slot is None:
                raise ValueError(
                    f"a parameter of FSDP module {self.name!r} was replaced, or began to require "
                    "gradients, after its hook was made"
                )
            found.append((slot, begin))
            begin += p.padded_sharded_param_size.numel()
        return found, begin

    @property
    def replicas(self) -> Any:
        """The group over which FSDP2 averages shards by itself (HSDP), or None."""
        return self.group._all_reduce_process_group if self.group._is_hsdp else None

    def leave_replicas(self) -> None:
        """Has FSDP2 no longer average shards over replicas: a hook does it.

        Shards and their DTensors stay what they are; only the group that reduces gradients takes
        itself for one on the mesh's other dimension alone.
        """
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

        both = self.group.mesh_info
        alone = FSDPMeshInfo(
            both.mesh,
            both.shard_mesh_dim,
            dp_mesh_dims=both.dp_mesh_dims,
            spmd_mesh=both.spmd_mesh,
        )
        alone.reduce_scatter_process_group = both.reduce_scatter_process_group
        self.group.mesh_info = alone
        if self.group.post_forward_mesh_info is both:
            self.group.post_forward_mesh_info = alone

    @property
    def states(self) -> tuple[Any, Any]:
        """Of `compress_reduce_scatter` and of `compress_all_reduce`, if it has them already."""
        hook = getattr(self.group._all_reduce_hook, "func", None)
        return (
            getattr(self.group._reduce_scatter_comm, "state", None),
            state if isinstance(state := getattr(hook, "__self__", None), UnitwiseKept) else None,
        )

    def check(self, buffer: Tensor, expected: int) -> None:
        """Refuses a buffer that is not of all parameters, or not of means."""
        if not self.group.all_reduce_grads:
            raise ValueError(
                f"FSDP module {self.name!r} was told set_requires_all_reduce(False), and would add "
                "up what was compressed; set_requires_gradient_sync(False) accumulates before"
            )
        if buffer.numel() != expected:
            raise RuntimeError(
                f"FSDP module {self.name!r} reduces {buffer.numel()} numbers, and its parameters "
                f"have {expected}: some got no gradient in this backward. torch has "
                "set_reduce_scatter_unused_params(True) for that"
            )
        if buffer.dtype == torch.float16:
            raise TypeError(
                f"FSDP module {self.name!r} reduces in float16, where torch divides before and "
                "after; set MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        if self.group.gradient_divide_factor is not None:
            raise ValueError(
                f"FSDP module {self.name!r} has a gradient divide factor; messages are of means"
            )
        if self.group.force_sum_reduction_for_comms:
            raise ValueError(
                f"FSDP module {self.name!r} was told to reduce by sums alone; messages are of means"
            )


def shard_numel(p: Any, shard: int, shards: int) -> int:
    """Elements of one shard, without padding."""
    size, dim = list(p._orig_size), p.fsdp_placement.dim
    each = -(-size[dim] // shards)
    size[dim] = max(0, min(each, size[dim] - shard * each))
    return int(torch.Size(size).numel())


def units_of(model: nn.Module, method: Method, setter: str) -> list[Unit]:
    """The units of a model with gradients to reduce.

    Raises:
        TypeError: no module is one of FSDP2's; this torch lacks what it takes; `method` is none.
        ValueError: the method looks at all gradients together.
    """
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        if not hasattr(module, setter):
            raise TypeError(f"torch {torch.__version__} has no FSDPModule.{setter}")
        groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
        if groups is None:
            raise TypeError(
                f"compression with fully_shard needs torch 2.13, not {torch.__version__}"
            )
        if len(groups) > 1:
            raise ValueError(
                f"FSDP module {name!r} has parameters on several meshes; torch takes no hook there"
            )
        found += [unit for group in groups if (unit := Unit(name, module, group)).params]
    if not found:
        raise TypeError("no module of the model is fully_shard's, with parameters to train")
    if getattr(method, "joint", False):  # what is no method, `Kept` refuses
        raise ValueError(
            f"{type(method).__name__} clips by the norm of all gradients, and FSDP2 reduces them "
            "module by module: nothing could be sent before backward is done"
        )
    return found


def names_of(model: nn.Module) -> dict[int, tuple[int, str]]:
    """Place and name of each parameter."""
    return {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())}


class UnitwiseKept(Kept):
    """States of what FSDP2 reduces unit by unit, with no word about which is the last."""

    _seen: frozenset[int] = frozenset()
    _task = -1
    # Groups that messages do not reach, and that train the same model: other shards (also those
    # of tensor parallelism) and other replicas.
    _others: Sequence[Any] = ()

    def _know(self, others: Sequence[Any]) -> None:
        """Sets them, and which of their ranks this one is."""
        self._others = others
        index, count = 0, 1
        for group in others:
            index = index * dist.get_world_size(group) + dist.get_rank(group)
            count *= dist.get_world_size(group)
        self._part = (index, count)

    def _void(self, skipped: bool) -> bool:
        # Messages tell their own group what is not finite. All have to keep the step, or none.
        void = torch.tensor([float(super()._void(skipped))], device=self._slots[0].device)
        for group in self._others:
            dist.all_reduce(void, dist.ReduceOp.MAX, group=group)
        return bool(void)

    def _arrived(self, index: int, unit: Unit) -> None:
        """A unit has gradients; whether a backward begins with it shows here."""
        task = torch._C._current_graph_task_id()
        if index in self._seen and task == self._task != -1:
            self._failed = True
            raise RuntimeError(
                f"FSDP module {unit.name!r} reduces its gradients twice in one backward, and "
                "states take in one gradient a step; call it once per forward"
            )
        if index in self._seen or not (self._complete or self._failed):
            if self._seen and self._greetings:
                self._greetings -= 1
            self._drop()
            self._seen = frozenset()
        self._seen |= {index}
        self._task = task


def other_groups(units: Sequence[Unit], known: Any) -> list[Any]:
    """The groups along all mesh dimensions of the units' parameters, but for one that is known."""
    here = dist.get_process_group_ranks(known)
    params = [p.sharded_param for unit in units for p in unit.params]
    return [g for g in mesh_groups(params) if dist.get_process_group_ranks(g) != here]


def common_group(units: Sequence[Unit]) -> Any:
    """The process group over which all units are sharded.

    Raises:
        ValueError: they are sharded over different ones.
    """
    groups = [unit.group._reduce_scatter_process_group for unit in units]
    ranks = [dist.get_process_group_ranks(group) for group in groups]
    if any(r != ranks[0] for r in ranks):
        raise ValueError("modules are sharded over different process groups")
    return groups[0]
