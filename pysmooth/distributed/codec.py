"""codec: what leaves the process, by the kernels of a backend where there are any, else in torch.

All tensors are flat and contiguous; floats are float32. All ways write the same bytes; sums of |x|
are rounded differently, and in torch sums of squares.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.backends import available_backends, cuda_module, native_module
from ..reference import codec as eager
from ..reference.random import permutation
from .schemes import index_bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """What is sent: b * e + a * g, b being 1 or -1. Flat, contiguous, float32."""

    g: Tensor
    e: Tensor | None = None
    a: float = 1.0
    b: float = 1.0

    def value(self) -> Tensor:
        """As a new tensor."""
        return eager.combine(self.g, self.e, self.a, self.b)

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, float, float]:
        """What it is made of."""
        return self.g, self.e, self.a, self.b

    @property
    def native(self) -> tuple[int, int, float, float, int]:
        """As kernels are told of it."""
        return _at(self.g), _at(self.e), self.a, self.b, len(self.g)


@dataclasses.dataclass(frozen=True)
class Target:
    """What becomes of a sum over ranks: out = base + factor * sum. Flat, contiguous, float32."""

    out: Tensor
    factor: float = 1.0
    base: Tensor | None = None

    def finish(self, factor: float | None = None) -> None:
        """Makes it of the sum that is in `out`; `factor`: what is left to multiply by."""
        factor = self.factor if factor is None else factor
        if factor != 1.0:
            self.out.mul_(factor)
        if self.base is not None:
            self.out.add_(self.base)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Which random numbers: of a seed, a step and a tensor."""

    seed: int
    step: int
    tensor: int

    @property
    def native(self) -> tuple[int, int, int]:
        """As kernels are told of it."""
        return self.seed, self.step, self.tensor


def all_finite(x: Tensor) -> bool:
    """Whether all are: their sum is, in one pass; where it overflows, each is looked at."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _native(x: Tensor) -> types.ModuleType | None:
    mine = x.device.type == "cpu" and len(x) > 0 and "cpu" in available_backends()
    return native_module() if mine else None


def _modules(x: Tensor) -> list[types.ModuleType]:
    """What has kernels for a device: CUDA C++ comes before Triton."""
    found: list[types.ModuleType] = []
    available = available_backends()
    if "cuda" in available and x.device.type == cuda_module().device_type:
        from . import cuda_codec

        found.append(cuda_codec)
    if "triton" in available and x.is_cuda:
        from ..triton_kernels import messages

        found.append(messages)
    return found


def _kernel(x: Tensor, name: str) -> Callable[..., Any] | None:
    """The launch of that name for x's device; None where the CPU's kernels, or torch's, take it."""
    modules = _modules(x) if len(x) > 0 and _native(x) is None else []
    return next((getattr(m, name) for m in modules if hasattr(m, name)), None)


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def code_signs(
    g: Tensor, e: Tensor | None, a: float, b: float, out: Tensor | None, bits: Tensor
) -> Tensor:
    """Takes x = b * e + a * g into `out`, its signs into `bits`; returns the sum of |x|."""
    if (native := _native(g)) is not None:
        threads = torch.get_num_threads()
        found = native.code(_at(g), _at(e), a, b, len(g), _at(out), _at(bits), threads)
        return torch.tensor(found, dtype=torch.float64)
    if (launch := _kernel(g, "code_signs")) is not None:
        total: Tensor = launch(g, e, a, b, out, bits)
        return total
    x = eager.combine(g, e, a, b)
    if out is not None:
        out.copy_(x)
    bits.copy_(eager.signs_of(x))
    return x.double().abs().sum()


def code_top_k(x: Source, k: int, out: Tensor | None, message: Tensor) -> bool:
    """Writes where the k largest of x are, and they, into `message`; whether all of x is finite.

    `out`, if given, is x without them.
    """
    if (launch := _kernel(x.g, "code_top_k")) is not None:
        spoiled = launch(x.g, x.e, x.a, x.b, k, out, message)
        return not bool(spoiled)
    index, values, finite = largest(x.g, x.e, x.a, x.b, k, out)
    d = len(x.g)
    packed = message[: index_bytes(d, k)]
    if d < k * (width := (d - 1).bit_length()):
        marks = torch.zeros(d, dtype=torch.int64, device=x.g.device)
        marks[index] = 1
        pack_bits(marks, 1, packed)
    else:
        pack_bits(index, width, packed)
    message[len(packed) :] = values.view(torch.uint8)
    return finite


def largest(
    g: Tensor, e: Tensor | None, a: float, b: float, k: int, out: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """Where the k largest of x = b * e + a * g are, they, and whether all of x is finite.

    `out`, if given, is x without them.
    """
    if (native := _native(g)) is not None:
        index, values = torch.empty(k, dtype=torch.int64), torch.empty(k)
        total = native.code_top_k(
            *(_at(g), _at(e), a, b, len(g), k, _at(out)),
            *(_at(index), _at(values), torch.get_num_threads()),
        )
        finite = math.isfinite(total) or all_finite(eager.combine(g, e, a, b))
        return index, values, finite
    x = eager.combine(g, e, a, b)
    index = eager.top_k(x, k)
    values = x[index]
    if out is not None:
        out.copy_(x)[index] = 0.0
    return index, values, all_finite(x)


def subtract_signs(x: Tensor, scale: Tensor) -> None:
    """X -= scale * sign(x), in place."""
    if (native := _native(x)) is not None:
        native.subtract_signs(_at(x), len(x), float(scale), torch.get_num_threads())
    elif (launch := _kernel(x, "subtract_signs")) is not None:
        launch(x, scale)
    else:
        eager.subtract_signs(x, scale)


def sum_signs(bits: Tensor, scales: Tensor | None, factor: float, out: Tensor) -> None:
    """Out = factor * the sum over ranks of scale * sign; a row of `bits` is a rank's message."""
    if (native := _native(out)) is not None:
        native.sum_signs(
            *(_at(bits), bits.stride(0), len(bits), _at(scales), len(out), factor, _at(out)),
            *(0, torch.get_num_threads()),
        )
    elif (launch := _kernel(out, "sum_signs")) is not None:
        launch(bits, scales, factor, out)
    else:
        out.copy_(eager.sum_signs(bits, scales, len(out)) * factor)


def vote(bits: Tensor, n: int, signs: Tensor) -> None:
    """The signs of the sum of n signs over ranks; a tie is a plus."""
    if (native := _native(signs)) is not None:
        native.sum_signs(
            *(_at(bits), bits.stride(0), len(bits), 0, n, 1.0, 0),
            *(_at(signs), torch.get_num_threads()),
        )
    elif (launch := _kernel(signs, "vote")) is not None:
        launch(bits, n, signs)
    else:
        signs.copy_(eager.signs_of(eager.sum_signs(bits, None, n)))


def pack_bits(numbers: Tensor, width: int, out: Tensor) -> None:
    """Numbers (int64) of `width` bits as bytes."""
    if (native := _native(numbers)) is not None:
        native.pack_bits(_at(numbers), len(numbers), width, _at(out))
    elif (launch := _kernel(numbers, "pack_bits")) is not None:
        launch(numbers, width, out)
    else:
        out.copy_(eager.pack_bits(numbers, width))


def unpack_bits(packed: Tensor, n: int, width: int) -> Tensor:
    """The n numbers of `pack_bits`, as int64."""
    if (native := _native(packed)) is not None:
        numbers = torch.empty(n, dtype=torch.int64)
        native.unpack_bits(_at(packed), n, width, _at(numbers))
        return numbers
    if (launch := _kernel(packed, "unpack_bits")) is not None:
        unpacked: Tensor = launch(packed, n, width)
        return unpacked
    return eager.unpack_bits(packed, n, width)


def sum_top_k(messages: Tensor, k: int, into: Target) -> None:
    """Sums messages about their k largest over ranks; a row is a rank's."""
    out = into.out
    if (native := _native(out)) is not None:
        rows, threads = _rows(messages), torch.get_num_threads()
        native.sum_top_k(*rows, len(out), k, into.factor, _at(into.base), _at(out), threads)
        return
    if (launch := _kernel(out, "sum_top_k")) is not None:
        rest = launch(messages, k, into.factor, into.base, out)
        Target(out, *rest).finish()
    else:
        out.copy_(eager.sum_top_k(messages, len(out), k))
        into.finish()


def code_natural(x: Source, drawn: Drawn, out: Tensor, message: Tensor) -> None:
    """Writes C(x) of natural compression into `message`, and x - C(x) into `out`."""
    if (native := _native(out)) is not None:
        threads = torch.get_num_threads()
        native.code_natural(*x.native, *drawn.native, _at(out), _at(message), threads)
    elif (launch := _kernel(out, "code_natural")) is not None:
        launch(*x.parts, drawn.native, out, message)
    else:
        value = x.value()
        sent, coded = eager.code_natural(value, *drawn.native)
        message.copy_(coded)
        out.copy_(value - sent)


def sum_natural(messages: Tensor, into: Target) -> None:
    """Sums such messages over ranks; a row is a rank's."""
    out = into.out
    if (launch := _kernel(out, "sum_natural")) is not None:
        launch(messages, into.factor, into.base, out)
        return
    if (native := _native(out)) is not None:
        native.sum_natural(*_rows(messages), len(out), _at(out), torch.get_num_threads())
    else:
        out.copy_(eager.sum_natural(messages, len(out)))
    into.finish()


def code_levels(
    x: Source, drawn: Drawn, levels: int, block: int, out: Tensor, message: Tensor
) -> None:
    """Writes C(x) of QSGD into `message`, and x - C(x) into `out`."""
    if (native := _native(out)) is not None:
        threads = torch.get_num_threads()
        drawing = (*drawn.native, levels, block)
        native.code_levels(*x.native, *drawing, _at(out), _at(message), threads)
    elif (launch := _kernel(out, "code_levels")) is not None:
        launch(*x.parts, drawn.native, levels, block, out, message)
    else:
        value = x.value()
        sent, coded = eager.code_levels(value, levels, block, *drawn.native)
        message.copy_(coded)
        out.copy_(value - sent)


def sum_levels(messages: Tensor, levels: int, block: int, into: Target) -> None:
    """Sums such messages over ranks; a row is a rank's."""
    out = into.out
    if (launch := _kernel(out, "sum_levels")) is not None:
        launch(messages, levels, block, into.factor, into.base, out)
        return
    if (native := _native(out)) is not None:
        threads = torch.get_num_threads()
        native.sum_levels(*_rows(messages), len(out), levels, block, _at(out), threads)
    else:
        out.copy_(eager.sum_levels(messages, len(out), levels, block))
    into.finish()


def code_rand_k(x: Source, drawn: Drawn, factor: float, out: Tensor, message: Tensor) -> None:
    """Writes drawn coordinates, times a factor, into `message`, and what is left into `out`."""
    if (launch := _kernel(out, "code_rand_k")) is not None:
        launch(*x.parts, drawn.native, factor, out, message)
        return
    out.copy_(x.value())
    index = places(len(message) // 4, out, drawn)
    kept = out[index]
    sent = kept * factor
    message.copy_(sent.view(torch.uint8))
    out[index] = kept - sent


def add_rand_k(message: Tensor, drawn: Drawn, out: Tensor) -> None:
    """Adds what one rank has sent to what those before it have."""
    if (launch := _kernel(out, "add_rand_k")) is not None:
        launch(message, drawn.native, out)
    else:
        out[places(len(message) // 4, out, drawn)] += eager.floats(message)


def places(k: int, like: Tensor, drawn: Drawn) -> Tensor:
    """The first k of a permutation of the numbers of elements of `like`."""
    if (native := _native(like)) is not None:
        index = torch.empty(k, dtype=torch.int64)
        native.permutation(k, len(like), *drawn.native, _at(index))
        return index
    seed, step, tensor = drawn.native
    return permutation(k, len(like), seed=seed, step=step, tensor_id=tensor).to(like.device)


def _rows(messages: Tensor) -> tuple[int, int, int]:
    return _at(messages), messages.stride(0), len(messages)
