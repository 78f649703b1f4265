"""One average of gradients over ranks: what everybody sends, and everybody decodes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .codec import all_finite
from .handshake import shake_hands
from .kept import HEADER, Job, Kept, header_of, parts_of, unscaled
from .method import Context, Slot
from .wire import floats, raw

# torch 2.13 renames it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Small parameters of so many bytes travel with the message, which saves them a collective of their
# own; on two ranks all of them do: gathering costs no more bytes than adding up there.
_TOGETHER = 16384


class Averaging(Kept):
    """States, and the average that they are about."""

    def _average(self, jobs: list[Job]) -> None:
        ranks = dist.get_world_size(self._group)
        context = Context(dist.get_rank(self._group), ranks, self.steps)
        scale = self._scale()
        if self._greetings:
            for job in jobs:
                shake_hands(self._words(job), self._group)
        coded = [[(slot, unscaled(piece, scale)) for slot, piece in job.coded] for job in jobs]
        self.method.prepare(context, [pair for some in coded for pair in some if self._moves(pair)])
        for job, own in zip(jobs, coded, strict=True):
            small = [unscaled(piece, scale) for _, piece in job.dense]
            size = 4 * sum(len(g) for g in small)
            together = bool(own) and (ranks == 2 or size <= _TOGETHER)
            if small and not together:
                self._dense(job, small, context, scale)
            if own:
                self._coded(job, own, small if together else [], context, scale)

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
        finite = all_finite(mean)
        self._failed = self._failed or not finite
        means = torch.split(mean, [len(g) for g in own])
        for (slot, piece), grad, part in zip(job.dense, own, means, strict=True):
            if finite and not self._warming and not self._small(slot):
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
        width = HEADER + sum(sizes)
        tail = torch.cat([raw(g) for g in small]) if small else None
        extra = 0 if tail is None else len(tail)
        rows = (ranks,) if method.two_phase else ()
        message = torch.zeros(
            *rows, width + (0 if rows else extra), dtype=torch.uint8, device=device
        )
        finite = self._encode(context, own, parts_of(message, sizes))
        header = header_of(job, finite)
        message[..., :HEADER] = header
        if method.two_phase:
            received = torch.empty_like(message)
            dist.all_to_all_single(received, message, group=self._group)
            self.sent_bytes += message.numel()
            self._check(received, header)
            message = torch.zeros(width + extra, dtype=torch.uint8, device=device)
            message[:HEADER] = header
            message[0] = received[:, 0].max()
            if not message[0]:
                for pair, part, reply in zip(
                    own, parts_of(received, sizes), parts_of(message, sizes), strict=True
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
        for (slot, piece), pair, part in zip(
            job.coded, own, parts_of(gathered, sizes), strict=True
        ):
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
