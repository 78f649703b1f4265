"""The hook for DistributedDataParallel, and its state: one for all methods."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from .handshake import shake_hands
from .method import Context, Method, Slot
from .signs import bounds

# DistributedDataParallel compares the hook's annotation with this.
GradBucket: TypeAlias = dist.GradBucket  # type: ignore[attr-defined,name-defined]

# torch 2.13 renames it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class _Job:
    """A bucket on its way."""

    buffer: Tensor
    coded: list[tuple[Slot, Tensor]]  # pieces of the buffer
    dense: list[tuple[Slot, Tensor]]
    future: Future[Tensor]

    @property
    def pieces(self) -> list[tuple[Slot, Tensor]]:
        """All of them."""
        return self.coded + self.dense


class CompressedState:
    """What `compressed_hook` keeps between steps.

    ::

        model = DistributedDataParallel(model)
        state = CompressedState(model, optimizer, EF14(TopK(ratio=0.01)))
        model.register_comm_hook(state, compressed_hook)

    Parameters are known by their names, whatever buckets they come in. What a step changes in this
    rank's states is staged, and becomes valid when `optimizer.step` has run: a step that fails, is
    skipped by `GradScaler`, or meets a gradient that is not finite on any rank (which gives NaN on
    all of them), leaves them as they were.

    Under `model.no_sync()` gradients add up locally, as always; the next backward sends their sum.
    Two backwards that both communicate before one step are not error feedback: the first one's
    changes are dropped.

    Args:
        module: the model, wrapped or not.
        optimizer: the one that steps it; its learning rates are read in every backward.
        method: what is sent: `EF14`, `EF21`, `TwoWaySign` ...
        process_group: as for DistributedDataParallel; None: the default one.
        dense_below: parameters of fewer elements are averaged as they are.
        warmup_steps: so many first steps average everything as it is.
        scaler: a `torch.amp.GradScaler`: what is kept and sent is then in units without its scale.

    Raises:
        ValueError: an argument is out of range, or the optimizer lacks a parameter and the method
            needs its learning rate.
        TypeError: an argument has the wrong type.
        MismatchError: in the first backward, on every rank: ranks have other methods, parameters,
            dtypes or orders.

    Attributes:
        steps: steps whose changes were kept.
        dropped: backwards whose changes were not.
        sent_bytes: what this rank's messages had in them in the last backward.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        process_group: Any = None,
        dense_below: int = 1024,
        warmup_steps: int = 0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be one of pysmooth.distributed's; got {method!r}")
        for name, value in (("dense_below", dense_below), ("warmup_steps", warmup_steps)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer, at least 0; got {value!r}")
        if isinstance(module, DistributedDataParallel):
            module = module.module
        self.method = method
        self.warmup_steps = warmup_steps
        self.steps = self.dropped = self.sent_bytes = 0
        self._optimizer, self._scaler = optimizer, scaler
        self._group = process_group
        self._dense_below = dense_below
        self._slots: dict[int, Slot] = {}
        self._about: dict[str, str] = {"method": repr(method)}
        self._about |= {"dense_below": str(dense_below), "warmup_steps": str(warmup_steps)}
        for index, (name, p) in enumerate(module.named_parameters()):
            if p.numel() >= 2**32:
                raise ValueError(f"parameter {name!r} has 2**32 elements or more")
            if p.is_complex():
                raise TypeError(f"parameter {name!r} is complex; hooks take real parameters")
            self._slots[id(p)] = Slot(name, index, p.numel(), p.device)
            self._about[f"parameter {name!r}"] = f"{p.dtype} of shape {tuple(p.shape)}"
        self._shaken = False
        self._jobs: list[_Job] = []  # that wait for the last one
        self._complete = self._failed = False
        # All collectives leave from one thread, in the order of buckets: another order on another
        # rank would pair them wrongly.
        self._thread: ThreadPoolExecutor | None = None
        optimizer.register_step_post_hook(lambda *_: self._stepped())

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Averages a bucket; what the hook does."""
        if not self._shaken:
            about = {"steps": str(self.steps), "a scaler": str(self._scaler is not None)}
            shake_hands(self._about | about, self._group)
            self._shaken = True
        if bucket.index() == 0:
            self._drop()
        job = self._job(bucket)
        self._jobs.append(job)
        self._complete = bucket.is_last()
        if self.method.joint and not self._complete and not self._warming:
            return job.future
        jobs, self._jobs = self._jobs, []
        if job.buffer.is_cuda:  # in order on the stream
            self._work(jobs)
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="pysmooth-hook")
            self._thread.submit(self._work, jobs)
        return job.future

    @property
    def _warming(self) -> bool:
        return self.steps < self.warmup_steps

    def _job(self, bucket: GradBucket) -> _Job:
        buffer = bucket.buffer()
        devices = [buffer.device] if buffer.is_cuda else None
        job = _Job(buffer, [], [], Future(devices=devices) if devices else Future())
        rates = self._rates() if self.method.uses_lr else {}
        for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            slot = self._slots.get(id(p))
            if slot is None:
                raise ValueError("a parameter of the model was replaced after the hook was made")
            # In the order of memory, which is the same on all ranks.
            begin = grad.storage_offset() - buffer.storage_offset()
            piece = (slot, buffer[begin : begin + slot.numel])
            small = slot.numel < max(self._dense_below, 1)
            if self.method.uses_lr:
                if id(p) not in rates:
                    raise ValueError(f"parameter {slot.name!r} is not in the optimizer")
                slot.lr = rates[id(p)]
            plain = small or self._warming or self.method.dense(slot)
            (job.dense if plain else job.coded).append(piece)
        return job

    def _rates(self) -> dict[int, float]:
        groups = self._optimizer.param_groups
        return {id(p): float(group["lr"]) for group in groups for p in group["params"]}

    def _work(self, jobs: list[_Job]) -> None:
        try:
            with torch.no_grad():
                self._average(jobs)
        except BaseException as error:
            self._failed = True
            for job in jobs:
                job.future.set_exception(error)  # type: ignore[arg-type]
            return
        for job in jobs:
            job.future.set_result(job.buffer)

    def _average(self, jobs: list[_Job]) -> None:
        ranks = dist.get_world_size(self._group)
        context = Context(dist.get_rank(self._group), ranks, self.steps)
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        grads = [[(slot, _float(piece, scale)) for slot, piece in job.coded] for job in jobs]
        # A rate of 0 moves nothing: nothing is sent, and what is kept stays.
        sending = [
            [(s, g) for s, g in some if not (self.method.uses_lr and s.lr == 0.0)] for some in grads
        ]
        self.method.prepare(context, [pair for some in sending for pair in some])
        for job, own in zip(jobs, sending, strict=True):
            self._dense(job, context, scale)
            self._coded(job, own, context, scale)

    def _dense(self, job: _Job, context: Context, scale: float) -> None:
        if not job.dense:
            return
        own = [_float(piece, scale) for _, piece in job.dense]
        mean = torch.cat(own)
        dist.all_reduce(mean, group=self._group)
        mean.mul_(1.0 / context.ranks)
        self.sent_bytes += 4 * len(mean)
        finite = _finite(mean)
        self._failed = self._failed or not finite
        means = torch.split(mean, [len(g) for g in own])
        for (slot, piece), grad, part in zip(job.dense, own, means, strict=True):
            if finite and not self._warming and slot.numel >= max(self._dense_below, 1):
                self.method.begin(slot, grad, part)
            piece.copy_(part * scale)

    def _coded(
        self, job: _Job, own: list[tuple[Slot, Tensor]], context: Context, scale: float
    ) -> None:
        if not job.coded:
            return
        method, ranks = self.method, context.ranks
        sizes = [method.size(slot.numel, ranks) for slot, _ in own]
        width = 1 + sum(sizes)  # the first byte: whether a gradient is not finite
        rows = (ranks,) if method.two_phase else ()
        message = torch.zeros(*rows, width, dtype=torch.uint8, device=job.buffer.device)
        finite = all(_finite(grad) for _, grad in own)
        if finite:
            for (slot, grad), part in zip(own, _parts(message, sizes), strict=True):
                method.encode(context, slot, grad, part)
                # e + lr * g overflows where g did not.
                finite = finite and all(_finite(slot.staged[key]) for key in slot.touched)
        message[..., 0] = 0 if finite else 1
        self.sent_bytes += message.numel()
        if method.two_phase:
            received = torch.empty_like(message)
            dist.all_to_all_single(received, message, group=self._group)
            message = torch.zeros(width, dtype=torch.uint8, device=message.device)
            message[0] = received[:, 0].max()
            if not message[0]:
                for (slot, _), part, reply in zip(
                    own, _parts(received, sizes), _parts(message, sizes), strict=True
                ):
                    method.serve(context, slot, part, reply)
            self.sent_bytes += message.numel()
        gathered = torch.empty(ranks * width, dtype=torch.uint8, device=message.device)
        _all_gather(gathered, message, group=self._group)
        gathered = gathered.view(ranks, width)
        bad = bool(gathered[:, 0].any())
        self._failed = self._failed or bad
        parts = {slot.index: p for (slot, _), p in zip(own, _parts(gathered, sizes), strict=True)}
        for slot, piece in job.coded:
            if bad or slot.index not in parts:
                piece.fill_(float("nan") if bad else 0.0)
                continue
            direct = piece.dtype == torch.float32
            out = piece if direct else torch.empty(slot.numel, device=piece.device)
            method.decode(context, slot, parts[slot.index], out)
            if scale != 1.0:
                out.mul_(scale)
            if not direct:
                piece.copy_(out)

    def _drop(self) -> None:
        """A backward begins: what the last one staged and no step took is void."""
        if self._complete or self._failed:
            self.dropped += 1
        self._complete = self._failed = False
        self.sent_bytes = 0
        self._jobs = []
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
        self._complete = self._failed = self._shaken = False
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


def compressed_hook(state: CompressedState, bucket: GradBucket) -> Future[Tensor]:
    """For `model.register_comm_hook(state, compressed_hook)`; DDP calls it, for each bucket.

    Args:
        state: what is sent, and what is kept between steps.
        bucket: the gradients that are ready.

    Raises:
        MismatchError: ranks were set up differently.
    """
    return state.reduce(bucket)


def _float(piece: Tensor, scale: float) -> Tensor:
    """A piece of a bucket in float32, without the loss's scale."""
    wide = piece.float()
    return wide if scale == 1.0 else wide * (1.0 / scale)


def _parts(message: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(torch.split(message[..., 1:], sizes, dim=-1))


def _finite(x: Tensor) -> bool:
    """Whether all are: their sum is, in one pass; where it overflows, each is looked at."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
