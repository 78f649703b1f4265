"""Methods that send what a compressor makes of a vector: DCSGD, error feedback, EF21."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import Tensor

from ..compressors import Compressor
from .method import Context, Method, Slot
from .wire import Source, Target, format_of


def _check_weight(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]; got {value!r}")


@dataclass(frozen=True)
class _Compressing(Method):
    compressor: Compressor

    def __post_init__(self) -> None:
        format_of(self.compressor)  # which may refuse it

    def size(self, d: int, ranks: int) -> int:
        """`compressor.bits(d)`, in bytes."""
        return format_of(self.compressor).size(d)


@dataclass(frozen=True)
class DCSGD(_Compressing):
    """The mean of C(g_i), the compressor drawing independently on every rank. No states.

    Args:
        compressor: an unbiased one: `RandK`, `QSGD`, `NaturalCompression`.

    Raises:
        ValueError: the compressor is biased.

    Source: arXiv:2506.00181.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compressor.omega(1024) is None:
            raise ValueError(
                f"compressor {self.compressor!r} is biased: without error feedback it does not "
                "converge; take EF14 or EF21"
            )

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """C(g)."""
        rest = grad.new_empty(len(grad))
        form = format_of(self.compressor)
        return form.encode(Source(grad), context.draw(slot), rest, message, keep=False)

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """Their mean."""
        into = Target(out, 1.0 / context.ranks)
        format_of(self.compressor).decode(messages, context.draw(slot), into)


@dataclass(frozen=True)
class EF14(_Compressing):
    """Error feedback, its memory in units of the parameters.

    ::

        Worker i:  m_i = momentum * m_i + g_i   (g_i itself where momentum is 0)
                   x_i = e_i + lr * m_i,  sends C(x_i),  e_i = x_i - C(x_i)
        all:       step with mean_i C(x_i) / lr

    Args:
        compressor: one of `pysmooth.compressors`.
        momentum: in [0, 1), before compression.

    At lr 0 zeros are sent, and e stays. States: `residual`, and `momentum_buffer`; 8 bytes per
    parameter each, since a step's changes are staged. Source: arXiv:1809.07599, arXiv:1901.09847.
    """

    _: KW_ONLY
    momentum: float = 0.0

    uses_lr = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum!r}")

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """C(e + lr * m)."""
        if self.momentum > 0:
            kept = slot.state("momentum_buffer")
            grad = slot.stage("momentum_buffer").copy_(kept).mul_(self.momentum).add_(grad)
        x = Source(grad, slot.state("residual"), slot.lr)
        draw = context.draw(slot)
        return format_of(self.compressor).encode(x, draw, slot.stage("residual"), message)

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """Their mean, over lr."""
        into = Target(out, 1.0 / (context.ranks * slot.lr))
        format_of(self.compressor).decode(messages, context.draw(slot), into)


@dataclass(frozen=True)
class EF21(_Compressing):
    r"""EF21: every rank's estimate follows its gradient through a compressor.

    ::

        Worker i:  v_i = (1 - eta) * v_i + eta * g_i   (`momenta` times; g_i itself without eta)
                   sends C(v_i - h_i),  h_i += C(v_i - h_i)
        all:       h += mean_i C(v_i - h_i);  step with h

    With `pysmooth.NormalizedSGD` and momentum=0 as the optimizer this is norm-EF21 (with eta:
    norm-EF21-SGDM): lr * h / \|\|h\|\|.

    Args:
        compressor: one of `pysmooth.compressors`.
        eta: weight of the new gradient in the momentum, in (0, 1]; None: no momentum.
        momenta: how many momenta there are, given an eta: 1 (EF21-SGDM) or 2 (EF21-SGD2M).
        init: "compressed": h starts from 0, so that the first step leaves it at the mean of C(g);
            "full": the first step sends gradients as they are. In both, momenta start from the
            first gradient. "zero": everything starts from 0.

    States: `estimate` (h_i), `mean_estimate` (h), and momenta, `momentum_buffer`; 8 bytes per
    parameter each, since a step's changes are staged. Source: arXiv:2106.05203, arXiv:2305.15155,
    arXiv:2410.16871.
    """

    _: KW_ONLY
    eta: float | None = None
    momenta: int = 1
    init: Literal["compressed", "full", "zero"] = "compressed"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("eta", self.eta)
        if self.momenta not in (1, 2):
            raise ValueError(f"momenta must be 1 or 2; got {self.momenta!r}")
        if self.init not in ("compressed", "full", "zero"):
            raise ValueError(f"init must be 'compressed', 'full' or 'zero'; got {self.init!r}")

    def dense(self, slot: Slot) -> bool:
        """The first step of init="full"."""
        return self.init == "full" and slot.steps == 0

    def begin(self, slot: Slot, grad: Tensor, mean: Tensor | None) -> None:
        """Estimates and momenta start from the gradient."""
        slot.state("estimate")
        slot.stage("estimate").copy_(grad)
        if mean is not None:
            slot.state("mean_estimate")
            slot.stage("mean_estimate").copy_(mean)
        self._momentum(slot, grad)

    def _momentum(self, slot: Slot, grad: Tensor) -> Tensor:
        if self.eta is None:
            return grad
        for i in range(self.momenta):
            key = "momentum_buffer" if i == 0 else f"momentum_buffer_{i + 1}"
            if key not in slot.states and self.init != "zero":
                slot.state(key)
                grad = slot.stage(key).copy_(grad)
            else:
                kept = slot.state(key)
                grad = slot.stage(key).copy_(kept).mul_(1 - self.eta).add_(grad * self.eta)
        return grad

    def encode(self, context: Context, slot: Slot, grad: Tensor, message: Tensor) -> bool:
        """C(v - h)."""
        v = self._momentum(slot, grad)
        form, draw = format_of(self.compressor), context.draw(slot)
        x = Source(v, slot.state("estimate"), b=-1.0)
        rest = slot.stage("estimate")
        finite = form.encode(x, draw, rest, message, keep=False)
        # What was sent, exactly: coordinates that were not stay as they are to the bit.
        own = Target(rest, base=slot.state("estimate"))
        form.decode(message.unsqueeze(0), draw, own, first=context.rank)
        return finite

    def decode(self, context: Context, slot: Slot, messages: Tensor, out: Tensor) -> None:
        """The mean of all estimates."""
        into = Target(out, 1.0 / context.ranks, slot.state("mean_estimate"))
        format_of(self.compressor).decode(messages, context.draw(slot), into)
        slot.stage("mean_estimate").copy_(out)

    def regroup(self, slot: Slot) -> None:
        """Every rank's estimate becomes the mean of all; momenta start anew."""
        kept = slot.states.get("mean_estimate")
        slot.states.clear()
        if kept is not None:
            slot.states = {"estimate": kept.clone(), "mean_estimate": kept}
