"""Sharded steps on a device: sums go over the processes without a look at them.

Kernels leave the sums of parts in the plan's memory; torch.distributed adds them up there, in
float64, between two launches (csrc/cuda/spread.cuh). The host learns late what went wrong, as in
any step on a device: then nothing had changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.amp import Amp
from ..engine.recipe import ELSEWHERE
from .exchange import OVERFLOWS_DIFFER, Peers, torn_message
from .sharded import ShardedEngine
from .sharded_view import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..optim._base import FusedOptimizer

# Where else the number of a tensor is; the second as in csrc/cuda/plan.h.
OVERFLOWS_DIFFERED, TORN_ELSEWHERE = -1, -2


class DeviceExchange(Peers):
    """Makes sums of parts into sums of tensors, in place, in the order of the current stream."""

    def __init__(
        self, layouts: Sequence[Any], labels: Sequence[str], process_group: Any = None
    ) -> None:
        super().__init__(layouts, labels, process_group)
        self.empty_live: tuple[bool, ...] = ()  # of the empty parts: which take part
        self.begins = [0] * len(layouts)  # where parts begin in the whole, once that was asked
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._differ: Tensor | None = None  # of this step's overflows, whether they do

    def ask_begins(self, sizes: Sequence[int]) -> None:
        """Has processes tell each other how many elements they have of each tensor. Waits."""
        for group, members in self._members.items():
            own = torch.tensor([sizes[i] for i in members], device=self.layouts[members[0]].device)
            every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(every, own, group=group)
            before = sum(every[: dist.get_rank(group)], torch.zeros_like(own))
            for i, begin in zip(members, before.tolist(), strict=True):
                self.begins[i] = begin

    def parts(self, rows: Tensor, *, largest: bool) -> None:
        """A row of every tensor: added up over those that hold parts of it, or the largest."""
        for group, members in self._members.items():
            self._reduce(rows, members, group, largest=largest)

    def units(self, numbers: Tensor, *, largest: bool) -> None:
        """Numbers of scope units, with the other stages of a pipeline."""
        dist.all_reduce(numbers, op=_op(largest=largest), group=self.process_group)

    def histograms(self, counts: Tensor, tensors: Sequence[int]) -> None:
        """A row for each of these tensors; how many elements have which digit."""
        for group, rows in self.rows_of(tensors):
            self._reduce(counts, rows, group, largest=False)

    def _reduce(self, rows: Tensor, members: Sequence[int], group: Any, *, largest: bool) -> None:
        first, last = members[0], members[-1]
        if last - first + 1 == len(members):  # the usual case: all of them
            dist.all_reduce(rows[first : last + 1], op=_op(largest=largest), group=group)
            return
        key = tuple(members)
        if key not in self._indices:
            self._indices[key] = torch.tensor(members, device=rows.device)
        at = self._indices[key]
        packed = rows.index_select(0, at)
        dist.all_reduce(packed, op=_op(largest=largest), group=group)
        rows.index_copy_(0, at, packed)

    def overflow(self, found: Tensor) -> Tensor:
        """Whether one of the processes was told of an overflow: then none has a step."""
        here = (found.detach().reshape(1) != 0).float()
        both = torch.cat([here, -here])
        for group in self.groups():
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        self._differ = both[0] != -both[1]
        return both[0]

    def note(self, torn: Tensor) -> None:
        """Writes down, where the host looks for it, that overflows differed in this step."""
        if self._differ is not None:
            torn.masked_fill_(self._differ, OVERFLOWS_DIFFERED)
            self._differ = None

    def complain(self, torn: int) -> None:
        """What the host is told of a step that processes did not agree about.

        Raises:
            RuntimeError: it was such a step.
        """
        if torn == OVERFLOWS_DIFFERED:
            raise RuntimeError(OVERFLOWS_DIFFER)
        if torn == TORN_ELSEWHERE:
            raise RuntimeError(torn_message(ELSEWHERE))
        if torn:
            raise RuntimeError(torn_message(f"parameter {self.labels[torn - 1]!r}"))


def _op(*, largest: bool) -> Any:
    return dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM


class DeviceShardedEngine(ShardedEngine):
    """Runs a device's backend on local parts, with a `DeviceExchange` between its launches."""

    exchange_type = DeviceExchange

    def _ready(self, optimizer: FusedOptimizer) -> View:
        known = self._exchange
        view = super()._ready(optimizer)
        if self._exchange is not known and self._sharding.compress == "global":
            sizes = [p.numel() for group in view.param_groups for p in group["params"]]
            cast("DeviceExchange", self._exchange).ask_begins(sizes)
        return view

    def _run(self, view: View, amp: Amp) -> None:
        exchange = cast("DeviceExchange", self._exchange)
        params = [p for group in view.param_groups for p in group["params"]]
        pairs = zip(params, exchange.live, strict=True)
        exchange.empty_live = tuple(live for p, live in pairs if p.numel() == 0)
        if amp.found_inf is not None:
            amp = Amp(amp.scale, exchange.overflow(amp.found_inf))
        self._inner.step(cast("FusedOptimizer", view), amp)

    def settle(self, optimizer: FusedOptimizer) -> int:
        """What has become of steps. States that were allocated in vain go from here as well."""
        if self._view is None:
            return 0
        with self._view.mirrored():
            skipped: int = self._inner.settle(cast("FusedOptimizer", self._view))
        return skipped
