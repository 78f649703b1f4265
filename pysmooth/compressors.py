"""Compressors: what error feedback and the EF21 family send in place of a vector.

A compressor is a small immutable object. `compress(xs)` gives C(x) of a list of tensors, dense, in
eager torch; optimizers run the same C fused, where their backend has it. Computation is in float32,
or float64 for float64 tensors. The parts of complex tensors are taken by themselves. Values that
are not finite pass through where a coordinate is looked at by itself; optimizers keep them away.

Elements are numbered in the order of a tensor's memory (row-major for contiguous ones): this
decides between equals in `TopK`, and which random number an element gets. Random numbers depend on
`seed`, `step`, the tensor's place in the list and the element's number alone (Philox4x32-10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from .reference import compress as eager
from .reference.order import flatten, unflatten

SelectScope = Literal["tensor", "global", "block"]
SignScope = Literal["tensor", "global"]
ScaleScope = Literal["tensor", "block"]
_SCOPES: dict[str, int] = {"tensor": 0, "global": 1, "block": 2}
Select = tuple[int, int, float, int, int, bool, int]
Dense = tuple[int, float, int]


@dataclass(frozen=True)
class Compressor:
    """The base class: C(x) of one tensor or of a list of them.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    def __call__(self, x: Tensor, *, step: int = 0, tensor_id: int = 0) -> Tensor:
        """C(x): a new tensor of x's shape, dtype and layout."""
        return self.numbered([x], [step], [tensor_id])[0]

    def compress(self, xs: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """C of each tensor; the scope "global" looks at all of them together."""
        return self.numbered(xs, [step] * len(xs), range(len(xs)))

    def numbered(
        self, xs: Sequence[Tensor], steps: Sequence[int], ids: Sequence[int]
    ) -> list[Tensor]:
        """C of tensors with a step and a place in the list each."""
        out = [flatten(x) for x in xs]
        held = [i for i, flat in enumerate(out) if len(flat) > 0]
        for unit in [held] if self._joint else [[i] for i in held]:
            if unit:
                sent = self._flat(torch.cat([out[i] for i in unit]), steps[unit[0]], ids[unit[0]])
                pieces = torch.split(sent, [len(out[i]) for i in unit])
                for i, piece in zip(unit, pieces, strict=True):
                    out[i] = piece
        return [unflatten(x, flat) for x, flat in zip(xs, out, strict=True)]

    def alpha(self, d: int) -> float | None:
        r"""E\|\|C(x) - x\|\|^2 <= (1 - alpha) \|\|x\|\|^2 for x of d elements; None: not so."""
        return None

    def omega(self, d: int) -> float | None:
        r"""Unbiased, with variance at most omega \|\|x\|\|^2 in d dimensions; None: biased."""
        return None

    def bits(self, d: int) -> int:
        """What d coordinates of one tensor take to send, in bits."""
        raise NotImplementedError

    @property
    def select(self) -> Select | None:
        """How coordinates are selected, if any are; the numbers of csrc/cpu/select.h."""
        return None

    @property
    def dense(self) -> Dense | None:
        """Kind, level and seed of the others, as csrc/core/compress.h has them."""
        return None

    @property
    def scale_scope(self) -> str:
        """What a scale is taken over, "tensor", "global" or "block"."""
        return "block" if self.scale_block else "global" if self._joint else "tensor"

    @property
    def scale_block(self) -> int | None:
        """How many consecutive elements share a scale; None for all of the scope."""
        return None

    @property
    def _joint(self) -> bool:
        return getattr(self, "scope", "tensor") == "global"

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Compressor):
    """C(x) = x: nothing is compressed."""

    def alpha(self, d: int) -> float:
        """1."""
        return 1.0

    def omega(self, d: int) -> float:
        """0."""
        return 0.0

    def bits(self, d: int) -> int:
        """32 per coordinate."""
        return 32 * d

    @property
    def dense(self) -> Dense:
        """Kind 0."""
        return (0, 0.0, 0)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        return x.clone()


@dataclass(frozen=True)
class TopK(Compressor):
    """Keeps the k largest magnitudes and zeroes the rest; of equals it keeps the first ones.

    Exact. Contractive: alpha = k / d. Zeros are never sent.

    Args:
        ratio: k is this part of the unit's elements, rounded up; in (0, 1].
        k: how many to keep, at least 1; all, where the unit has fewer. Either `ratio` or `k`.
        scope: the unit: "tensor", "global" (all tensors together), or "block".
        block_size: for scope "block": so many consecutive elements; a tensor's last block may be
            shorter. The cpu backend takes powers of two up to 32768.

    Source: arXiv:1809.07599.
    """

    _: KW_ONLY
    ratio: float | None = None
    k: int | None = None
    scope: SelectScope = "tensor"
    block_size: int = 1024

    def __post_init__(self) -> None:
        _check_count(self.ratio, self.k)
        _check_scope(self.scope, _SCOPES)
        _check_integer("block_size", self.block_size, 1)

    def chosen_of(self, elements: int) -> int:
        """How many of a unit's elements are kept."""
        return _chosen(self.ratio, self.k, elements)

    def alpha(self, d: int) -> float:
        """K / d."""
        if self.scope == "block":
            sizes = [min(self.block_size, d)] + (
                [d % self.block_size] if d % self.block_size else []
            )
            return min(self.chosen_of(size) / size for size in sizes)
        return self.chosen_of(d) / d

    def bits(self, d: int) -> int:
        """A float and an index per coordinate kept, or a bitmap and the floats if that is less."""
        if self.scope == "block":
            whole, rest = divmod(d, self.block_size)
            return whole * self._unit_bits(self.block_size) + (self._unit_bits(rest) if rest else 0)
        return self._unit_bits(d)

    def _unit_bits(self, d: int) -> int:
        k = self.chosen_of(d)
        return min(k * (32 + (d - 1).bit_length()), d + 32 * k)

    @property
    def select(self) -> Select:
        """Kind 1."""
        return (1, _SCOPES[self.scope], self.ratio or 0.0, self.k or 0, self.block_size, False, 0)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        if self.scope != "block":
            return eager.top_k(x, self.chosen_of(len(x)))
        return torch.cat(
            [eager.top_k(b, self.chosen_of(len(b))) for b in torch.split(x, self.block_size)]
        )


@dataclass(frozen=True)
class RandK(Compressor):
    """Keeps k coordinates of each tensor, drawn without replacement.

    The draw depends on `seed`, the step and the tensor's place alone: ranks that share a seed
    choose the same coordinates and need not send them.

    Args:
        ratio: k is this part of the tensor's elements, rounded up; in (0, 1].
        k: how many to keep. Either `ratio` or `k`.
        scaled: multiply by d / k: unbiased, omega = d / k - 1. Otherwise contractive in
            expectation, alpha = k / d.
        seed: of the draw, from 0 to 2^64 - 1.

    Source: arXiv:1809.07599.
    """

    _: KW_ONLY
    ratio: float | None = None
    k: int | None = None
    scaled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count(self.ratio, self.k)
        _check_seed(self.seed)
        if not isinstance(self.scaled, bool):
            raise TypeError(f"scaled must be True or False; got {self.scaled!r}")

    def chosen_of(self, elements: int) -> int:
        """How many of a tensor's elements are kept."""
        return _chosen(self.ratio, self.k, elements)

    def alpha(self, d: int) -> float | None:
        """K / d, in expectation, where nothing is scaled."""
        return None if self.scaled else self.chosen_of(d) / d

    def omega(self, d: int) -> float | None:
        """D / k - 1 where it is scaled."""
        return d / self.chosen_of(d) - 1 if self.scaled else None

    def bits(self, d: int) -> int:
        """32 per coordinate kept; indices follow from the seed."""
        return 32 * self.chosen_of(d)

    @property
    def select(self) -> Select:
        """Kind 2."""
        return (2, 0, self.ratio or 0.0, self.k or 0, 1024, self.scaled, self.seed)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        k = self.chosen_of(len(x))
        return eager.rand_k(
            x, k, scaled=self.scaled, seed=self.seed, step=step, tensor_id=tensor_id
        )


@dataclass(frozen=True)
class ScaledSign(Compressor):
    r"""C(x) = (\|\|x\|\|_1 / d) * sign(x), with sign(0) = +1: one bit per coordinate.

    Contractive: alpha = \|\|x\|\|_1^2 / (d \|\|x\|\|_2^2), at least 1 / d.

    Args:
        scope: over what the mean magnitude is taken: "tensor" or "global".

    Source: arXiv:1901.09847.
    """

    _: KW_ONLY
    scope: SignScope = "tensor"

    def __post_init__(self) -> None:
        _check_scope(self.scope, ("tensor", "global"))

    def alpha(self, d: int) -> float:
        """1 / d, the worst case."""
        return 1.0 / d

    def bits(self, d: int) -> int:
        """One per coordinate, and a float."""
        return d + 32

    @property
    def dense(self) -> Dense:
        """Kind 1."""
        return (1, 0.0, 0)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        return eager.scaled_sign(x, x.double().abs().sum() / len(x))


@dataclass(frozen=True)
class HardThreshold(Compressor):
    r"""Keeps coordinates of at least `threshold`; \|\|C(x) - x\|\|^2 <= d threshold^2.

    Args:
        threshold: greater than 0.

    Source: arXiv:2108.00951.
    """

    threshold: float

    def __post_init__(self) -> None:
        value: object = self.threshold
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.threshold > 0 or math.isinf(self.threshold):
            raise ValueError(f"threshold must be greater than 0 and finite; got {self.threshold!r}")

    def bits(self, d: int) -> int:
        """At most those of the whole vector and a bitmap: what is sent depends on x."""
        return 33 * d

    @property
    def dense(self) -> Dense:
        """Kind 2."""
        return (2, float(self.threshold), 0)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        return torch.where(x.abs() >= self.threshold, x, 0.0)


@dataclass(frozen=True)
class QSGD(Compressor):
    r"""\|\|x\|\|_2 sign(x) n / levels, n being an integer next to levels \|x\| / \|\|x\|\|_2.

    Which one is drawn. Unbiased: omega = min(d / levels^2, sqrt(d) / levels), d being the elements
    of a tensor or of a block.

    Args:
        levels: from 1 to 2^20.
        scope: over what the norm is taken: "tensor" or "block", the paper's bucket.
        block_size: for scope "block": so many consecutive elements; a tensor's last block may be
            shorter. The cpu backend takes powers of two up to 32768.
        seed: of the rounding, from 0 to 2^64 - 1.

    Source: arXiv:1610.02132.
    """

    levels: int
    _: KW_ONLY
    scope: ScaleScope = "tensor"
    block_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("levels", self.levels, 1, 2**20)
        _check_scope(self.scope, ("tensor", "block"))
        _check_integer("block_size", self.block_size, 1)
        _check_seed(self.seed)

    def omega(self, d: int) -> float:
        """min(d / levels^2, sqrt(d) / levels), of the longest block."""
        d = min(d, self.scale_block or d)
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    def bits(self, d: int) -> int:
        """A float per norm, and a sign and a level per coordinate."""
        return 32 * -(-d // (self.scale_block or d or 1)) + d * (1 + self.levels.bit_length())

    @property
    def scale_block(self) -> int | None:
        """`block_size`, for scope "block"."""
        return self.block_size if self.scope == "block" else None

    @property
    def dense(self) -> Dense:
        """Kind 3."""
        return (3, float(self.levels), self.seed)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        block = self.scale_block or len(x)
        return eager.qsgd(x, self.levels, block, seed=self.seed, step=step, tensor_id=tensor_id)


@dataclass(frozen=True)
class NaturalCompression(Compressor):
    """Rounds magnitudes to one of the next two powers of two, drawn. Unbiased: omega = 1 / 8.

    Args:
        seed: of the rounding, from 0 to 2^64 - 1.

    Source: arXiv:1905.10988.
    """

    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def omega(self, d: int) -> float:
        """1 / 8."""
        return 0.125

    def bits(self, d: int) -> int:
        """Sign and exponent."""
        return 9 * d

    @property
    def dense(self) -> Dense:
        """Kind 4."""
        return (4, 0.0, self.seed)

    def _flat(self, x: Tensor, step: int, tensor_id: int) -> Tensor:
        return eager.natural(x, seed=self.seed, step=step, tensor_id=tensor_id)


# ---- checks --------------------------------------------------------------------------------------


def _chosen(ratio: float | None, k: int | None, elements: int) -> int:
    if elements == 0:
        return 0
    count = math.ceil(ratio * elements) if ratio is not None else int(k or 0)
    return min(elements, max(1, count))


def _check_count(ratio: object, k: object) -> None:
    if (ratio is None) == (k is None):
        raise ValueError(f"give either ratio or k; got ratio={ratio!r}, k={k!r}")
    if k is not None:
        _check_integer("k", k, 1)
    elif isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1]; got {ratio!r}")


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}; got {value!r}")


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1; got {seed!r}")


def _check_scope(scope: object, scopes: Iterable[str]) -> None:
    if scope not in tuple(scopes):
        raise ValueError(f"scope must be one of {', '.join(scopes)}; got {scope!r}")
