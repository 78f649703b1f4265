"""Sums over the processes that hold parts of a tensor: what a sharded step asks torch.distributed.

Everything is packed: one all-reduce per process group and pass, whatever the number of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.recipe import Scope

# As csrc/core/step.h numbers them; the others are added up.
SUM_SQUARES, SUM_ABS, MAX_ABS, MIN_ABS, COUNT_NONZERO, SUM_POWER = range(6)
_OPS = {MAX_ABS: dist.ReduceOp.MAX, MIN_ABS: dist.ReduceOp.MIN}
_NAN = 2.0  # a flag: the part's sum is not a number, which MAX and MIN would lose


@dataclass(frozen=True)
class Layout:
    """How one tensor lies over the processes.

    Attributes:
        groups: the process groups over which it is cut up, one per mesh dimension on which it is
            sharded; none for a tensor that is whole here. Replicas are not counted.
        elements: of the whole tensor.
        device: where its local part is, and collectives run.
        in_order: whether the parts, by rank, are the whole in the order of memory.
    """

    groups: tuple[Any, ...]
    elements: int
    device: torch.device
    in_order: bool = True


def layout_of(tensor: Tensor, label: str) -> Layout:
    """The layout of a tensor or DTensor.

    Raises:
        ValueError: it holds partial sums, or this process is not part of its mesh.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return Layout((), tensor.numel(), tensor.device)
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(f"{label} is a DTensor on a mesh that this process is not part of")
    groups = []
    for dim, placement in enumerate(tensor.placements):
        if is_shard(placement):
            if mesh.size(dim) > 1:
                groups.append(mesh.get_group(dim))
        elif not placement.is_replicate():
            raise ValueError(
                f"{label} is a DTensor with placement {placement}, whose norm is not known before "
                "its parts are added up; redistribute it first"
            )
    plain = all(p.is_replicate() or p.is_shard(0) for p in tensor.placements)
    return Layout(
        tuple(groups), tensor.numel(), tensor.to_local().device, plain and len(groups) < 2
    )


def is_shard(placement: Any) -> bool:
    """Whether a placement cuts a tensor up; the strided kind of FSDP2 with TP does as well."""
    return bool(placement.is_shard()) or type(placement).__name__ == "_StridedShard"


def mesh_groups(tensors: Iterable[Any]) -> list[Any]:
    """The process groups along all mesh dimensions of DTensors, each once, in order."""
    from torch.distributed.tensor import DTensor

    found: dict[tuple[int, ...], Any] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            for group in tensor.device_mesh.get_all_groups():
                found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    return [group for ranks, group in found.items() if len(ranks) > 1]


class Peers:
    """Who holds the other parts of which tensors, these in a fixed order.

    Args:
        layouts: of the tensors.
        labels: their names, for messages.
        process_group: over which other tensors of the same model lie, such as the stages of a
            pipeline; None: there are no others.
    """

    def __init__(
        self, layouts: Sequence[Layout], labels: Sequence[str], process_group: Any = None
    ) -> None:
        self.layouts, self.labels, self.process_group = layouts, labels, process_group
        self.device = layouts[0].device if layouts else torch.device("cpu")
        self.live: Sequence[bool] = [True] * len(layouts)  # which take part in this step
        self._members: dict[Any, list[int]] = {}
        for i, layout in enumerate(layouts):
            for group in layout.groups:
                self._members.setdefault(group, []).append(i)

    def groups(self) -> list[Any]:
        """All process groups that a step's sums go over."""
        return [*self._members, *([] if self.process_group is None else [self.process_group])]

    def rows_of(self, tensors: Sequence[int]) -> Iterator[tuple[Any, list[int]]]:
        """Which of these tensors lie over each process group that any of them lies over."""
        for group, members in self._members.items():
            held = set(members)
            if at := [row for row, t in enumerate(tensors) if t in held]:
                yield group, at


def torn_message(what: str) -> str:
    """What is said of a tensor that takes part in some processes only."""
    return f"{what} has a gradient in some processes that hold parts of it, and none in others"


OVERFLOWS_DIFFER = (
    "GradScaler found an overflow in some processes and none in others, because it asks those that "
    "share the first gradient's mesh alone: use pysmooth.distributed.GradScaler"
)


class Exchange(Peers):
    """Makes sums of parts into sums of tensors, on the host."""

    def __init__(
        self, layouts: Sequence[Layout], labels: Sequence[str], process_group: Any = None
    ) -> None:
        super().__init__(layouts, labels, process_group)
        self.flagged: list[str] = []  # which are not finite somewhere

    def tensors(
        self, kind: int, sums: list[float], flags: list[float]
    ) -> tuple[list[float], list[float]]:
        """Sums and flags of whole tensors.

        Raises:
            RuntimeError: a tensor takes part in some processes, and in others does not.
        """
        op = _OPS.get(kind, dist.ReduceOp.SUM)
        sign = -1.0 if kind == MIN_ABS else 1.0  # flags go up where the rest goes down
        for group, members in self._members.items():
            rows = []
            for i in members:
                flag = _NAN if math.isnan(sums[i]) and kind in _OPS else flags[i]
                here = float(self.live[i])
                rows.append([sums[i], sign * flag, sign * here, sign * (1 - here)])
            packed = torch.tensor(rows, dtype=torch.float64, device=self.layouts[members[0]].device)
            dist.all_reduce(packed, op=op, group=group)
            for i, (total, flag, here, missing) in zip(members, packed.tolist(), strict=True):
                if here and missing:
                    raise RuntimeError(torn_message(f"parameter {self.labels[i]!r}"))
                nan = kind in _OPS and sign * flag >= _NAN
                sums[i], flags[i] = (math.nan if nan else total), abs(flag)
        self.flagged = [name for name, f in zip(self.labels, flags, strict=True) if f]
        return sums, flags

    def units(
        self, kind: int, scope: int, sums: list[float], flag: float
    ) -> tuple[list[float], float]:
        """Sums of scope units with the tensors of other pipeline stages.

        Units of scope "tensor" have none there. Whether all is finite is agreed upon in any case.
        """
        if self.process_group is None:
            return sums, flag
        shared = [] if scope == Scope.TENSOR else sums
        op = _OPS.get(kind, dist.ReduceOp.SUM)
        sign = -1.0 if kind == MIN_ABS else 1.0
        nan = float(any(math.isnan(s) for s in shared)) if kind in _OPS else 0.0
        packed = torch.tensor(
            [*shared, sign * flag, sign * nan], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(packed, op=op, group=self.process_group)
        *totals, flag, nan = packed.tolist()
        totals = [math.nan] * len(totals) if nan else totals
        return (totals if shared else sums), abs(flag)

    def same_overflow(self, found: float) -> None:
        """Whether all processes were told the same by their scalers.

        Raises:
            RuntimeError: on all of them: some were not.
        """
        both = torch.tensor([float(found != 0), -float(found != 0)], device=self.device)
        for group in self.groups():
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        highest, lowest = both.tolist()
        if highest != -lowest:
            raise RuntimeError(OVERFLOWS_DIFFER)

    def digits(self, tensors: list[int], histograms: memoryview) -> None:
        """How many elements of each tensor have which digit, a row of int64 each; in place."""
        rows = torch.frombuffer(histograms, dtype=torch.int64).view(len(tensors), -1)
        for group, at in self.rows_of(tensors):
            packed = rows[at]
            dist.all_reduce(packed, group=group)
            rows[at] = packed

    def before(self, tensors: list[int], counts: list[int]) -> list[int]:
        """The sums of each tensor's count over the parts that come before this one."""
        sums = [0] * len(tensors)
        for group, at in self.rows_of(tensors):
            rank = dist.get_rank(group)
            every = torch.zeros(dist.get_world_size(group), len(at), dtype=torch.int64)
            every[rank] = torch.tensor([counts[row] for row in at])
            dist.all_reduce(every, group=group)
            for row, total in zip(at, every[:rank].sum(0).tolist(), strict=True):
                sums[row] = total
        return sums
