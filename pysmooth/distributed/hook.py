"""The hook for DistributedDataParallel, and its state: one for all methods."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from .average import Averaging
from .kept import Job, new_slot
from .method import Method
from .sharded_view import is_dtensor

# DistributedDataParallel compares the hook's annotation with this.
GradBucket: TypeAlias = dist.GradBucket  # type: ignore[attr-defined,name-defined]


class CompressedState(Averaging):
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
        TypeError: an argument has the wrong type, or a parameter is complex or a DTensor.
        MismatchError: in the first backward, on every rank: ranks have other methods, parameters,
            dtypes, orders, buckets or, where the method needs them, learning rates. The last two
            in any backward.

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
        if isinstance(module, DistributedDataParallel):
            module = module.module
        slots, about = [], {}
        for index, (name, p) in enumerate(module.named_parameters()):
            if is_dtensor(p):
                raise TypeError(
                    f"parameter {name!r} is a DTensor, of which a bucket has a part; for "
                    "fully_shard there are compress_all_reduce and compress_reduce_scatter"
                )
            slots.append(new_slot(name, index, p, p.numel()))
            about[f"parameter {name!r}"] = f"{p.dtype} of shape {tuple(p.shape)}"
        self._by_id = {slot.owner: slot for slot in slots}
        super().__init__(
            slots,
            about,
            optimizer,
            method,
            process_group=process_group,
            dense_below=dense_below,
            warmup_steps=warmup_steps,
            scaler=scaler,
        )
        self._jobs: list[tuple[Job, Future[Tensor]]] = []  # that wait for the last one
        self._error: BaseException | None = None
        # All collectives leave from one thread, in the order of buckets: another order on another
        # rank would pair them wrongly.
        self._thread: ThreadPoolExecutor | None = None

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Averages a bucket; what the hook does."""
        if bucket.index() == 0:
            self._drop()
            self._jobs, self._error = [], None
        buffer, last = bucket.buffer(), bucket.is_last()
        begins = [g.storage_offset() - buffer.storage_offset() for g in bucket.gradients()]
        pieces = []
        for p, begin in zip(bucket.parameters(), begins, strict=True):
            if id(p) not in self._by_id:
                raise ValueError("a parameter of the model was replaced after the hook was made")
            pieces.append((self._by_id[id(p)], begin))
        held = f"bucket {bucket.index()}{', the last' if last else ''}"
        job = self._job(held, buffer, pieces)
        future: Future[Tensor] = Future(devices=[buffer.device]) if buffer.is_cuda else Future()
        self._jobs.append((job, future))
        self._complete = last
        if self.method.joint and not last and not self._warming:
            return future
        jobs, self._jobs = self._jobs, []
        if buffer.is_cuda:  # in order on the stream
            self._work(jobs)
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="pysmooth-hook")
            done = self._thread.submit(self._work, jobs)
            if last:  # backward waits for it in any case, and cannot say what a future failed of
                done.result()
        if self._error is not None:
            raise self._error
        if last and self._greetings:
            self._greetings -= 1
        return future

    def _work(self, jobs: list[tuple[Job, Future[Tensor]]]) -> None:
        try:
            if self._error is None:  # else others have stopped as well
                with torch.no_grad():
                    self._average([job for job, _ in jobs])
        except BaseException as error:
            self._error, self._failed = error, True
        for job, future in jobs:
            if self._error is None:
                future.set_result(job.buffer)
            else:
                future.set_exception(self._error)  # type: ignore[arg-type]


def compressed_hook(state: CompressedState, bucket: GradBucket) -> Future[Tensor]:
    """For `model.register_comm_hook(state, compressed_hook)`; DDP calls it, for each bucket.

    Args:
        state: what is sent, and what is kept between steps.
        bucket: the gradients that are ready.

    Raises:
        MismatchError: ranks were set up differently.
    """
    return state.reduce(bucket)
