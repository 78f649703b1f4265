"""Methods that send a bit per coordinate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import codec
from .method import Context, Method, Slot
from .wire import Signs, Source, Target


def _signs_of(grad: Tensor, bits: Tensor) -> bool:
    """Writes them; whether all are finite."""
    total = codec.code_signs(grad, None, 1.0, 1.0, None, bits)
    return bool(total.isfinite()) or codec.all_finite(grad)


@dataclass(frozen=True)
class DSignSGD(Method):
    """The mean over ranks of sign(g): values of -1, -1 + 2/N, ..., 1. A zero counts as a plus.

    d bits per rank. No states. Source: arXiv:2506.00181.
    """

    def size(self, d: int, ranks: int) -> int:
        """D bits."""
        return -(-d // 8)

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """Signs."""
        return _signs_of(grad, message)

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """Their mean."""
        codec.sum_signs(messages, None, 1.0 / context.ranks, out)


def share_of(d: int, ranks: int) -> int:
    """Elements of which one server is in charge: whole bytes of signs."""
    return 8 * -(-d // (8 * ranks))


def bounds(d: int, ranks: int, server: int) -> tuple[int, int]:
    """Of a server's share: its first element, and the one after its last."""
    share = share_of(d, ranks)
    return min(d, server * share), min(d, (server + 1) * share)


def _deal(packed: Tensor, shares: Tensor, d: int) -> None:
    """Packed signs of all elements, cut up for their servers."""
    for server in range(len(shares)):
        begin, end = bounds(d, len(shares), server)
        piece = packed[begin // 8 : -(-end // 8)]
        shares[server, : len(piece)] = piece


@dataclass(frozen=True)
class MajorityVote(Method):
    """The sign of the sum over ranks of sign(g), voted by a server for each share; ties are +1.

    d bits each way. No states. Source: arXiv:1810.05291.
    """

    two_phase = True

    def size(self, d: int, ranks: int) -> int:
        """The bits of a share."""
        return share_of(d, ranks) // 8

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """Signs."""
        packed = message.new_empty(-(-len(grad) // 8))
        finite = _signs_of(grad, packed)
        _deal(packed, message, len(grad))
        return finite

    def serve(self, context: Context, slot: Slot, messages: Tensor, reply: Tensor) -> None:
        """Counts votes."""
        begin, end = bounds(slot.numel, context.ranks, context.rank)
        codec.vote(messages, end - begin, reply[: -(-(end - begin) // 8)])

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """What was voted."""
        for server in range(context.ranks):
            begin, end = bounds(slot.numel, context.ranks, server)
            codec.sum_signs(messages[server : server + 1], None, 1.0, out[begin:end])


@dataclass(frozen=True)
class TwoWaySign(Method):
    """Scaled signs both ways, with error feedback on workers and on servers.

    Worker i:  x_i = e_i + lr * g_i,  sends C(x_i),  e_i = x_i - C(x_i)
    server:    y = s + mean_i C(x_i),  sends C(y),  s = y - C(y)
    all:       step with C(y) / lr

    where C(x) = mean|x| * sign(x), the mean being over a tensor for workers and over a server's
    share of it for servers. d + 32 N bits to the servers, d + 32 N back, per rank.

    States: `residual`, and `server_residual` for a share: 4 bytes per parameter and 4 / N, twice,
    since a step's changes are staged. Source: arXiv:1905.10936.
    """

    two_phase = True
    uses_lr = True

    def size(self, d: int, ranks: int) -> int:
        """The bits of a share, and a scale."""
        return 4 + share_of(d, ranks) // 8

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """Scaled signs of the residual and the gradient."""
        whole = message.new_empty(Signs().size(len(grad)))
        x = Source(grad, slot.state("residual"), slot.lr)
        finite = Signs().encode(x, context.draw(slot), slot.stage("residual"), whole)
        message[:, :4] = whole[:4]
        _deal(whole[4:], message[:, 4:], len(grad))
        return finite

    def serve(self, context: Context, slot: Slot, messages: Tensor, reply: Tensor) -> None:
        """The mean of a share and what was left of it, in scaled signs."""
        begin, end = bounds(slot.numel, context.ranks, context.rank)
        if begin == end:
            return
        residual = slot.state("server_residual", end - begin)
        left = slot.stage("server_residual")
        Signs().decode(messages, context.draw(slot), Target(left))
        x = Source(left, residual, 1.0 / context.ranks)  # in place
        Signs().encode(x, context.draw(slot), left, reply[: Signs().size(end - begin)])

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """Every server's share."""
        for server in range(context.ranks):
            begin, end = bounds(slot.numel, context.ranks, server)
            if begin < end:
                into = Target(out[begin:end], 1.0 / slot.lr)
                Signs().decode(messages[server : server + 1], context.draw(slot), into)
