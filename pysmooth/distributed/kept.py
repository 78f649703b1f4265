"""What a rank keeps between steps: one for the hooks of DDP and of FSDP2."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import pysmooth

from ..optim._base import FusedOptimizer
from .codec import all_finite
from .handshake import MismatchError
from .method import Context, Method, Slot
from .signs import bounds

# Before a message: whether a gradient is not finite, and a digest of what the message is about.
HEADER = 5
# So many first backwards compare in words what is sent, and not by digest alone:
# DistributedDataParallel puts its buckets together anew after the first.
GREETINGS = 2


@dataclass
class Job:
    """A buffer of gradients on its way."""

    buffer: Tensor
    coded: list[tuple[Slot, Tensor]] = field(default_factory=list)  # pieces of the buffer
    dense: list[tuple[Slot, Tensor]] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)  # what has to be the same on all ranks


def new_slot(name: str, index: int, p: Tensor, numel: int) -> Slot:
    """The place of `numel` elements of a parameter.

    Raises:
        TypeError: the parameter is complex.
        ValueError: it is too large for a message.
    """
    if numel >= 2**32:
        raise ValueError(f"parameter {name!r} has 2**32 elements or more")
    if p.is_complex():
        raise TypeError(f"parameter {name!r} is complex; hooks take real parameters")
    return Slot(name, index, numel, p.device, owner=id(p))


class Kept:
    """States, staged until the optimizer has stepped. `CompressedState` tells the arguments.

    Args:
        slots: what messages are about, in the order of messages.
        about: what else has to be the same on all ranks, in words.
    """

    def __init__(
        self,
        slots: list[Slot],
        about: dict[str, str],
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
        self._skips = _skips_of(optimizer)
        self._group = process_group
        self._dense_below = dense_below
        self._slots = slots
        self._about = {
            "version of pysmooth": pysmooth.__version__,
            "method": repr(method),
            "dense_below": str(dense_below),
            "warmup_steps": str(warmup_steps),
            **about,
        }
        self._part = (0, 1)  # of how many sets of ranks with states of their own this is which
        self._greetings = GREETINGS
        self._complete = self._failed = False
        optimizer.register_step_post_hook(lambda *_: self._stepped())

    @property
    def _warming(self) -> bool:
        return self.steps < self.warmup_steps

    def _job(self, held: str, buffer: Tensor, pieces: list[tuple[Slot, int]]) -> Job:
        """The job for a buffer of gradients: what they are of, and where they begin."""
        job = Job(buffer)
        rates = self._rates() if self.method.uses_lr else {}
        job.about = {"steps": str(self.steps), held: f"{buffer.numel()} x {buffer.dtype}"}
        for slot, begin in pieces:
            about = f"at {begin}"
            if self.method.uses_lr:
                if slot.owner not in rates:
                    raise ValueError(f"parameter {slot.name!r} is not in the optimizer")
                slot.lr = rates[slot.owner]
                about = f"{about}, learning rate {slot.lr!r}"
            plain = self._small(slot) or self._warming or self.method.dense(slot)
            # In the order of memory, which is the same on all ranks.
            piece = (slot, buffer[begin : begin + slot.numel])
            (job.dense if plain else job.coded).append(piece)
            job.about[f"{slot.name!r} in {held}"] = f"{about}, {'dense' if plain else 'coded'}"
        return job

    def _small(self, slot: Slot) -> bool:
        return slot.numel < max(self._dense_below, 1)

    def _rates(self) -> dict[int, float]:
        groups = self._optimizer.param_groups
        return {id(p): float(group["lr"]) for group in groups for p in group["params"]}

    def _moves(self, pair: tuple[Slot, Tensor]) -> bool:
        """A rate of 0 moves nothing: what is kept stays."""
        return not (self.method.uses_lr and pair[0].lr == 0.0)

    def _encode(
        self, context: Context, pairs: list[tuple[Slot, Tensor]], parts: list[Tensor]
    ) -> bool:
        """Writes the message of each gradient; whether all of them are finite."""
        finite = True
        for (slot, grad), part in zip(pairs, parts, strict=True):
            if self._moves((slot, grad)):
                good = self.method.encode(context, slot, grad, part)
            else:
                good = all_finite(grad)
            finite = finite and good
        return finite

    def _scale(self) -> float:
        """Of the loss."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def _words(self, job: Job) -> dict[str, str]:
        """All that has to be the same on all ranks."""
        return self._about | {"a scaler": str(self._scaler is not None)} | job.about

    def _check(self, messages: Tensor, header: Tensor) -> None:
        differs = (messages[:, 1:HEADER] != header[1:]).any(dim=1)
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
        for slot in self._slots:
            slot.touched.clear()

    def _stepped(self) -> None:
        skipped = self._skipped()
        if not self._complete:
            return
        if self._void(skipped):
            self._failed = True
            self._drop()
            return
        for slot in self._slots:
            slot.commit()
        self.steps += 1
        self._complete = False

    def _skipped(self) -> bool:
        """Whether the optimizer made nothing of this step, though it was called."""
        found_inf = getattr(self._optimizer, "found_inf", None)  # GradScaler's, for fused steps
        before, self._skips = self._skips, _skips_of(self._optimizer)
        return self._skips != before or (found_inf is not None and float(found_inf) != 0)

    def _void(self, skipped: bool) -> bool:
        """Whether what the step staged is to be dropped."""
        return self._failed or skipped

    def state_dict(self) -> dict[str, Any]:
        """This rank's states. Every rank saves its own."""
        return {
            "method": repr(self.method),
            "rank": dist.get_rank(self._group),
            "part": list(self._part),
            "world_size": dist.get_world_size(self._group),
            "steps": self.steps,
            "states": {
                slot.name: {
                    "steps": slot.steps,
                    **{key: value.clone() for key, value in slot.states.items()},
                }
                for slot in self._slots
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
        if tuple(state_dict.get("part", (0, 1))) != self._part:
            raise ValueError(
                f"state_dict is of part {state_dict['part'][0]} of {state_dict['part'][1]} of the "
                f"job; this one needs that of part {self._part[0]} of {self._part[1]}"
            )
        states = state_dict["states"]
        for slot in self._slots:
            self._check_saved(slot, states.get(slot.name), same)
        self.steps = state_dict["steps"]
        self._complete = self._failed = False
        self._greetings = GREETINGS
        for slot in self._slots:
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


def _skips_of(optimizer: torch.optim.Optimizer) -> int:
    return optimizer.skipped_steps() if isinstance(optimizer, FusedOptimizer) else 0


def header_of(job: Job, finite: bool) -> Tensor:
    """What a message begins with."""
    digest = zlib.crc32(repr(job.about).encode()).to_bytes(4, "little")
    flags = [0 if finite else 1, *digest]
    return torch.tensor(flags, dtype=torch.uint8, device=job.buffer.device)


def unscaled(piece: Tensor, scale: float) -> Tensor:
    """A piece of a buffer in float32, without the loss's scale."""
    wide = piece.float()
    return wide if scale == 1.0 else wide * (1.0 / scale)


def parts_of(message: Tensor, sizes: list[int]) -> list[Tensor]:
    """A message's parts, without its header and what travels behind them."""
    whole = message[..., HEADER : HEADER + sum(sizes)]
    return list(torch.split(whole, sizes, dim=-1))
