"""Compressed reduce-scatter for FSDP2: `set_custom_reduce_scatter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .codec import all_finite
from .handshake import shake_hands
from .kept import HEADER, Job, header_of, new_slot, parts_of, unscaled
from .method import Context, Method, Slot
from .units import (
    Unit,
    UnitwiseKept,
    common_group,
    names_of,
    other_groups,
    shard_numel,
    units_of,
)
from .wire import floats, raw

Pairs = list[tuple[Slot, Tensor]]


class _Comm:
    """What FSDP2 calls in place of its reduce-scatter."""

    def __init__(self, state: ReduceScatterState, index: int) -> None:
        self.state, self._index = state, index

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **_: Any
    ) -> None:
        self.state._reduce(self._index, output_tensor, input_tensor)


class ReduceScatterState(UnitwiseKept):
    """What `compress_reduce_scatter` keeps: workers' states of all shards, a server's of its own.

    Attributes and methods are those of `CompressedState`, but for another number of ranks: then
    `load_state_dict` drops what was kept, and the method begins anew.

    Args:
        model: after `fully_shard`.
        optimizer: the one that steps it.
        method: what is sent.
        kwargs: the others of `compress_reduce_scatter`.

    Raises:
        ValueError, TypeError, MismatchError: as `compress_reduce_scatter` tells.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, **kwargs: Any
    ) -> None:
        self._units = units_of(model, method, "set_custom_reduce_scatter")
        if getattr(method, "two_phase", False):  # what is no method, `Kept` refuses
            raise ValueError(
                f"{type(method).__name__} sends back what servers make of messages; under FSDP2 "
                "every rank steps its own shards and sends no gradient back. DSignSGD and "
                "EF14(ScaledSign()) send signs one way"
            )
        if any(unit.states[1] is not None for unit in self._units):
            raise ValueError("call compress_reduce_scatter before compress_all_reduce")
        group = common_group(self._units)
        ranks = dist.get_world_size(group)
        names, about, found = names_of(model), {}, []
        for unit in self._units:
            for p in unit.params:
                index, name = names[id(p.sharded_param)]
                about[f"parameter {name!r}"] = f"{p.sharded_param.dtype} of shape {p._orig_size}"
                for shard in range(ranks):
                    numel = shard_numel(p, shard, ranks)
                    where = f"{name}[{shard}]"
                    slot = new_slot(where, index * ranks + shard, p.sharded_param, numel)
                    unit.slots[slot.owner, shard] = slot
                    found.append(slot)
        super().__init__(found, about, optimizer, method, process_group=group, **kwargs)
        self._know(other_groups(self._units, group))
        for index, unit in enumerate(self._units):
            unit.module.set_custom_reduce_scatter(_Comm(self, index))

    @torch.no_grad()
    def _reduce(self, index: int, output: Tensor, buffer: Tensor) -> None:
        unit = self._units[index]
        self._arrived(index, unit)
        try:
            self._scatter(unit, output, buffer)
        except BaseException:
            self._failed = True
            raise
        self._complete = True

    def _scatter(self, unit: Unit, output: Tensor, buffer: Tensor) -> None:
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        context = Context(rank, ranks, self.steps)
        pieces, end = [], 0
        for shard in range(ranks):
            some, end = unit.pieces(shard, end)
            pieces += some
        unit.check(buffer, end)
        job = self._job(f"module {unit.name!r}", buffer, pieces)
        if self._greetings:
            shake_hands(self._words(job), self._group)
        scale = self._scale()
        everybody = [self._of(unit, job, shard) for shard in range(ranks)]
        grads = [
            tuple([(slot, unscaled(piece, scale)) for slot, piece in part] for part in parts)
            for parts in everybody
        ]
        messages, finite = [], True
        for coded, dense in grads:
            message, good = self._message(context, coded, dense)
            messages.append(message)
            finite = finite and good
        header = header_of(job, finite)
        for message in messages:
            message[:HEADER] = header
        coded, dense = everybody[rank]
        received = self._exchange(messages, rank)
        self._check(received, header)
        bad = bool(received[:, 0].any())
        self._failed = self._failed or bad
        output.zero_()  # padding
        at = rank * output.numel()  # where this rank's shards begin in the buffer
        sizes = [self.method.size(slot.numel, ranks) for slot, _ in coded]
        for (slot, piece), part in zip(coded, parts_of(received, sizes), strict=True):
            begin = piece.storage_offset() - buffer.storage_offset() - at
            out = torch.zeros(slot.numel, device=output.device)
            if bad:
                out.fill_(float("nan"))
            elif self._moves((slot, piece)):
                self.method.decode(context, slot, part, out)
            output[begin : begin + slot.numel] = out * scale
        self._means(grads, dense, received[:, HEADER + sum(sizes) :], rank, output, buffer, scale)

    def _of(self, unit: Unit, job: Job, shard: int) -> tuple[Pairs, Pairs]:
        """The pieces of a buffer that go to one rank: coded, dense."""
        mine = {id(slot) for slot, _ in unit.pieces(shard)[0] if slot.numel}
        coded = [pair for pair in job.coded if id(pair[0]) in mine]
        return coded, [pair for pair in job.dense if id(pair[0]) in mine]

    def _message(self, context: Context, coded: Pairs, dense: Pairs) -> tuple[Tensor, bool]:
        """A message to one rank, but for its header, and whether all in it is finite."""
        sizes = [self.method.size(slot.numel, context.ranks) for slot, _ in coded]
        tail = 4 * sum(slot.numel for slot, _ in dense)
        device = self._slots[0].device
        message = torch.zeros(HEADER + sum(sizes) + tail, dtype=torch.uint8, device=device)
        finite = self._encode(context, coded, parts_of(message, sizes))
        if tail:
            message[-tail:] = torch.cat([raw(g) for _, g in dense])
        return message, finite and all(all_finite(g) for _, g in dense)

    def _exchange(self, messages: list[Tensor], rank: int) -> Tensor:
        """Everybody's message to this rank, a row for each."""
        lengths, own = [len(m) for m in messages], len(messages[rank])
        self.sent_bytes += sum(lengths)
        received = messages[rank].new_empty(len(messages) * own)
        rows = [own] * len(messages)
        dist.all_to_all_single(received, torch.cat(messages), rows, lengths, group=self._group)
        return received.view(len(messages), own)

    def _means(
        self,
        grads: Sequence[tuple[Pairs, ...]],
        dense: Pairs,
        rows: Tensor,
        rank: int,
        output: Tensor,
        buffer: Tensor,
        scale: float,
    ) -> None:
        """Dense pieces are their means; a method may begin from them."""
        means: list[Tensor] = []
        if dense:
            total = floats(rows[0])
            for row in rows[1:]:
                total = total + floats(row)
            means = list(torch.split(total / len(rows), [slot.numel for slot, _ in dense]))
        for shard, (_, own) in enumerate(grads):
            for i, (slot, grad) in enumerate(own):
                mean = means[i] if shard == rank else None
                if mean is not None:
                    piece = dense[i][1]
                    begin = piece.storage_offset() - buffer.storage_offset() - rank * len(output)
                    output[begin : begin + slot.numel] = mean * scale
                if not (self._failed or self._warming or self._small(slot)):
                    self.method.begin(slot, grad, mean)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was saved, given as many ranks; else the method begins anew.

        Raises:
            ValueError: it is another method's or another rank's, or does not fit the parameters;
                then nothing has changed.
        """
        ranks = dist.get_world_size(self._group)
        same_method = state_dict.get("method") == repr(self.method)
        if same_method and "steps" in state_dict and state_dict.get("world_size", ranks) != ranks:
            self.steps = state_dict["steps"]
            self._begin_anew()
            return
        super().load_state_dict(state_dict)

    def _begin_anew(self) -> None:
        self._complete = self._failed = False
        for slot in self._slots:
            slot.steps = 0
            slot.states, slot.staged, slot.touched = {}, {}, set()


def compress_reduce_scatter(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    *,
    dense_below: int = 1024,
    warmup_steps: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> ReduceScatterState:
    """Compresses FSDP2's reduction of gradients: each rank is the server of its own shards.

    ::

        fully_shard(model)
        optimizer = ...
        state = compress_reduce_scatter(model, optimizer, EF14(TopK(ratio=0.01)))

    Every rank sends every other one a message about that one's shards (`all_to_all`), which
    averages them. Messages, scales and selections are about shards. A worker's states are about all
    shards, as long as the whole model on every rank: where that is too much memory, shard within a
    node and compress between nodes (`compress_all_reduce`), or take a method without states
    (`DSignSGD`, `DCSGD`). Parameters are gathered as always. Where the model is also replicated
    (HSDP), FSDP2 averages over replicas as always; `compress_all_reduce`, called behind this,
    compresses that, too. Modules may be tensor-parallel: a message is then about a rank's part.

    Args:
        model: after `fully_shard`, of it or of modules in it; all over the same ranks.
        optimizer: the one that steps it; its learning rates are read in every backward.
        method: `DSignSGD`, `DCSGD`, `EF14`, `EF21`; not those with two phases, nor `Clip21SGD2M`.
        dense_below: shards of fewer elements are averaged as they are.
        warmup_steps: so many first steps average everything as it is.
        scaler: a `torch.amp.GradScaler`: what is kept and sent is then in units without its scale.

    Returns:
        The state: `state_dict` and `load_state_dict`, `steps`, `dropped`, `sent_bytes`.

    Raises:
        ValueError: an argument is out of range, or the method is one of the others.
        TypeError: an argument has the wrong type, or the model no module of FSDP2.
        MismatchError: in the first backward: ranks were set up differently.
    """
    return ReduceScatterState(
        model,
        optimizer,
        method,
        dense_below=dense_below,
        warmup_steps=warmup_steps,
        scaler=scaler,
    )
