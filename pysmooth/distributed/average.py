"""Averaging by a method: what is common to the hooks of DDP and of FSDP2."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import pysmooth

from .handshake import MismatchError, shake_hands
from .method import Context, Method, Slot
from .signs import bounds
from .wire import floats, raw

# torch 2.13 renames it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Before a message: whether a gradient is not finite, and a digest of what the message is about.
_HEADER = 5
# So many first backwards compare in words what is sent, and not by digest alone:
# DistributedDataParallel puts its buckets together anew after the first.
_GREETINGS = 2
# Small parameters of so many bytes travel with the message, which saves them a collective of their
# own; on two ranks all of them do: gathering costs no more bytes than adding up there.
_TOGETHER = 16384


@dataclass
class Job:
    """A buffer of gradients on its way."""

    buffer: Tensor
    coded: list[tuple[Slot, Tensor]] = field(default_factory=list)  # pieces of the buffer
    dense: list[tuple[Slot, Tensor]] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)  # what has to be the same on all ranks

    @property
    def pieces(self) -> list[tuple[Slot, Tensor]]:
        """All of them."""
        return self.coded + self.dense


class Averaging:
    """What a rank keeps between steps, and one average. `CompressedState` tells the arguments."""

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        process_group: Any,
        dense_below: int,
        warmup_steps: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be one of pysmooth.distributed's; got {method!r}")
        for name, value in (("dense_below", dense_below), ("warmup_steps", warmup_steps)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer, at least 0; got {value!r}")
        self.method = method
        self.warmup_steps = warmup_steps
        self.steps = self.dropped = self.sent_bytes = 0
        self._optimizer, self._scaler = optimizer, scaler
        self._group = process_group
        self._dense_below = dense_below
        self._slots: dict[int, Slot] = {}
        self._about = {
            "version of pysmooth": pysmooth.__version__,
            "method": repr(method),
            "dense_below": str(dense_below),
            "warmup_steps": str(warmup_steps),
        }
        for index, (name, p) in enumerate(named):
            if p.numel() >= 2**32:
                raise ValueError(f"parameter {name!r} has 2**32 elements or more")
            if p.is_complex():
                raise TypeError(f"parameter {name!r} is complex; hooks take real parameters")
            self._slots[id(p)] = Slot(name, index, p.numel(), p.device)
            self._about[f"parameter {name!r}"] = f"{p.dtype} of shape {tuple(p.shape)}"
        self._greetings = _GREETINGS
        self._complete = self._failed = False
        optimizer.register_step_post_hook(lambda *_: self._stepped())

    @property
    def _warming(self) -> bool:
        return self.steps < self.warmup_steps

    def _job(self, index: int, last: bool, buffer: Tensor, pieces: list[tuple[Tensor, int]]) -> Job:
        """The job for a buffer of gradients: parameters, and where theirs begin."""
        job = Job(buffer)
        rates = self._rates() if self.method.uses_lr else {}
        held = f"bucket {index}{', the last' if last else ''}"
        job.about = {"steps": str(self.steps), held: f"{buffer.numel()} x {buffer.dtype}"}
        for p, begin in pieces:
            slot = self._slots.get(id(p))
            if slot is None:
                raise ValueError("a parameter of the model was replaced after the hook was made")
            about = f"at {begin}"
            if self.method.uses_lr:
                if id(p) not in rates:
                    raise ValueError(f"parameter {slot.name!r} is not in the optimizer")
                slot.lr = rates[id(p)]
                about = f"{about}, learning rate {slot.lr!r}"
            small = slot.numel < max(self._dense_below, 1)
            plain = small or self._warming or self.method.dense(slot)
            # In the order of memory, which is the same on all ranks.
            piece = (slot, buffer[begin : begin + slot.numel])
            (job.dense if plain else job.coded).append(piece)
            job.about[f"{slot.name!r} in {held}"] = f"{about}, {'dense' if plain else 'coded'}"
        return job

    def _rates(self) -> dict[int, float]:
        groups = self._optimizer.param_groups
        return {id(p): float(group["lr"]) for group in groups for p in group["params"]}

    def _average(self, jobs: list[Job]) -> None:
        ranks = dist.get_world_size(self._group)
        context = Context(dist.get_rank(self._group), ranks, self.steps)
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        if self._greetings:
            for job in jobs:
                scaled = {"a scaler": str(self._scaler is not None)}
                shake_hands(self._about | scaled | job.about, self._group)
        coded = [[(slot, _float(piece, scale)) for slot, piece in job.coded] for job in jobs]
        self.method.prepare(context, [pair for some in coded for pair in some if self._moves(pair)])
        for job, own in zip(jobs, coded, strict=True):
            small = [_float(piece, scale) for _, piece in job.dense]
            size = 4 * sum(len(g) for g in small)
            together = bool(own) and (ranks == 2 or size <= _TOGETHER)
            if small and not together:
                self._dense(job, small, context, scale)
            if own:
                self._coded(job, own, small if together else [], context, scale)

    def _moves(self, pair: tuple[Slot, Tensor]) -> bool:
        """A rate of 0 moves nothing: what is kept stays."""
        return not (self.method.uses_lr and pair[0].lr == 0.0)

    def _dense(self, job: Job, own: list[Tensor], context: Context, scale: float) -> None:
        total = torch.cat(own)
        dist.all_reduce(total, group=self._group)
        self.sent_bytes += 4 * len(total)
        self._spread(job, own, total, context, scale)

    def _spread(
        self, job: Job, own: list[Tensor], total: Tensor, context: Context, scale: float
    ) -> None:
        """Dense pieces are their means."""
        mean = total.mul_(1.0 / context.ranks)
        finite = _finite(mean)
        self._failed = self._failed or not finite
        means = torch.split(mean, [len(g) for g in own])
        for (slot, piece), grad, part in zip(job.dense, own, means, strict=True):
            if finite and not self._warming and slot.numel >= max(self._dense_below, 1):
                self.method.begin(slot, grad, part)
            piece.copy_(part * scale)

    def _coded(
        self,
        job: Job,
        own: list[tuple[Slot, Tensor]],
        small: list[Tensor],
        context: Context,
        scale: float,
    ) -> None:
        method, ranks, device = self.method, context.ranks, job.buffer.device
        # Also where nothing moves: a rank whose rate is another one must not get another size.
        sizes = [method.size(slot.numel, ranks) for slot, _ in own]
        width = _HEADER + sum(sizes)
        tail = torch.cat([raw(g) for g in small]) if small else None
        extra = 0 if tail is None else len(tail)
        rows = (ranks,) if method.two_phase else ()
        message = torch.zeros(
            *rows, width + (0 if rows else extra), dtype=torch.uint8, device=device
        )
        finite = all(_finite(grad) for _, grad in own)
        if finite:
            for (slot, grad), part in zip(own, _parts(message, sizes), strict=True):
                if not self._moves((slot, grad)):
                    continue
                method.encode(context, slot, grad, part)
                # e + lr * g overflows where g did not.
                finite = finite and all(_finite(slot.staged[key]) for key in slot.touched)
        digest = zlib.crc32(repr(job.about).encode()).to_bytes(4, "little")
        header = torch.tensor([0 if finite else 1, *digest], dtype=torch.uint8, device=device)
        message[..., :_HEADER] = header
        if method.two_phase:
            received = torch.empty_like(message)
            dist.all_to_all_single(received, message, group=self._group)
            self.sent_bytes += message.numel()
            self._check(received, header)
            message = torch.zeros(width + extra, dtype=torch.uint8, device=device)
            message[:_HEADER] = header
            message[0] = received[:, 0].max()
            if not message[0]:
                for pair, part, reply in zip(
                    own, _parts(received, sizes), _parts(message, sizes), strict=True
                ):
                    if self._moves(pair):
                        method.serve(context, pair[0], part, reply)
        if tail is not None:
            message[width:] = tail
        self.sent_bytes += message.numel()
        gathered = torch.empty(ranks * len(message), dtype=torch.uint8, device=device)
        _all_gather(gathered, message, group=self._group)
        gathered = gathered.view(ranks, -1)
        self._check(gathered, header)
        bad = bool(gathered[:, 0].any())
        self._failed = self._failed or bad
        for (slot, piece), pair, part in zip(job.coded, own, _parts(gathered, sizes), strict=True):
            if bad or not self._moves(pair):
                piece.fill_(float("nan") if bad else 0.0)
                continue
            direct = piece.dtype == torch.float32
            out = piece if direct else torch.empty(slot.numel, device=device)
            method.decode(context, slot, part, out)
            if scale != 1.0:
                out.mul_(scale)
            if not direct:
                piece.copy_(out)
        if small:
            total = floats(gathered[0, width:])
            for row in gathered[1:]:
                total += floats(row[width:])
            self._spread(job, small, total, context, scale)

    def _check(self, messages: Tensor, header: Tensor) -> None:
        differs = (messages[:, 1:_HEADER] != header[1:]).any(dim=1)
        if bool(differs.any()):
            rank = int(differs.nonzero()[0])
            raise MismatchError(
                f"rank {rank} and rank {dist.get_rank(self._group)} have come to mean other things "
                f"in step {self.steps}: learning rates, buckets or steps differ"
            )

    def _drop(self) -> None:
        """A backward begins: what the last one staged and no step took is void."""
        if self._complete or self._failed:
            self.dropped += 1
        self._complete = self._failed = False
        self.sent_bytes = 0
        for slot in self._slots.values():
            slot.touched.clear()

    def _stepped(self) -> None:
        if not self._complete:
            return
        if self._failed:
            self._drop()
            return
        for slot in self._slots.values():
            slot.commit()
        self.steps += 1
        self._complete = False

    def state_dict(self) -> dict[str, Any]:
        """This rank's states. Every rank saves its own."""
        return {
            "method": repr(self.method),
            "rank": dist.get_rank(self._group),
            "world_size": dist.get_world_size(self._group),
            "steps": self.steps,
            "states": {
                slot.name: {
                    "steps": slot.steps,
                    **{key: value.clone() for key, value in slot.states.items()},
                }
                for slot in self._slots.values()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was saved: with the same bits, given as many ranks as then.

        With another number of ranks, load rank 0's on all of them: residuals are dropped, and
        every worker's estimate starts from the mean of all (EF21, Clip21).

        Raises:
            ValueError: it is another method's or another rank's, or does not fit the parameters;
                then nothing has changed.
        """
        missing = {"method", "rank", "world_size", "steps", "states"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(map(repr, sorted(missing)))}")
        if state_dict["method"] != repr(self.method):
            raise ValueError(
                f"state_dict is of {state_dict['method']}, this state of {self.method!r}"
            )
        same = state_dict["world_size"] == dist.get_world_size(self._group)
        wanted = dist.get_rank(self._group) if same else 0
        if state_dict["rank"] != wanted:
            raise ValueError(
                f"state_dict is of rank {state_dict['rank']} of {state_dict['world_size']}; "
                f"this one needs that of rank {wanted}"
            )
        states = state_dict["states"]
        for slot in self._slots.values():
            self._check_saved(slot, states.get(slot.name), same)
        self.steps = state_dict["steps"]
        self._complete = self._failed = False
        self._greetings = _GREETINGS
        for slot in self._slots.values():
            saved = dict(states[slot.name])
            slot.steps = saved.pop("steps")
            slot.states = {
                key: value.to(slot.device, torch.float32, copy=True) for key, value in saved.items()
            }
            slot.staged, slot.touched = {}, set()
            if not same:
                self.method.regroup(slot)

    def _check_saved(self, slot: Slot, saved: dict[str, Any] | None, same: bool) -> None:
        where = f"of parameter {slot.name!r}"
        if saved is None or type(saved.get("steps")) is not int:
            raise ValueError(f"state_dict lacks the states {where}, or their 'steps'")
        for key, value in saved.items():
            if key == "steps":
                continue
            numel = slot.numel
            if key == "server_residual":
                ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
                begin, end = bounds(slot.numel, ranks, rank)
                numel = end - begin
                if not same:
                    continue  # dropped
            if not isinstance(value, Tensor) or tuple(value.shape) != (numel,):
                found = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"{key!r} {where} is {found}, not a tensor of shape {(numel,)}")


def _float(piece: Tensor, scale: float) -> Tensor:
    """A piece of a bucket in float32, without the loss's scale."""
    wide = piece.float()
    return wide if scale == 1.0 else wide * (1.0 / scale)


def _parts(message: Tensor, sizes: list[int]) -> list[Tensor]:
    """A message's parts, without its header and what travels behind them."""
    whole = message[..., _HEADER : _HEADER + sum(sizes)]
    return list(torch.split(whole, sizes, dim=-1))


def _finite(x: Tensor) -> bool:
    """Whether all are: their sum is, in one pass; where it overflows, each is looked at."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
