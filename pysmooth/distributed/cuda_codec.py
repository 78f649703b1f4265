"""codec on the CUDA backend: the kernels of csrc/cuda, on torch's current stream.

What triton_kernels.messages has, in the same words. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.backends import cuda_module

Key = tuple[int, int, int]  # seed, step, tensor


def _run(name: str, device: torch.device, **given: Any) -> None:
    """A launch; tensors go by their addresses, what is None is left out."""
    numbers = {
        key: value.data_ptr() if isinstance(value, Tensor) else value
        for key, value in given.items()
        if value is not None
    }
    launch = getattr(cuda_module(), name)
    if device.type != "cuda":  # the emulation
        launch(0, **numbers)
        return
    with torch.cuda.device(device):
        launch(torch.cuda.current_stream(device).cuda_stream, **numbers)


def _rows(messages: Tensor) -> dict[str, Any]:
    return {"messages": messages, "stride": messages.stride(0), "ranks": len(messages)}


def _source(g: Tensor, e: Tensor | None, a: float, b: float) -> dict[str, Any]:
    return {"n": len(g), "g": g, "e": e, "a": a, "b": b}


def _drawn(key: Key) -> dict[str, int]:
    return dict(zip(("seed", "step", "tensor"), key, strict=True))


# ---- signs ---------------------------------------------------------------------------------------


def code_signs(
    g: Tensor, e: Tensor | None, a: float, b: float, out: Tensor | None, bits: Tensor
) -> Tensor:
    """Takes x = b * e + a * g into `out`, its signs into `bits`; returns the sum of |x|."""
    sums = torch.empty(cuda_module().sums_of(len(g)), dtype=torch.float64, device=g.device)
    _run("code_signs", g.device, **_source(g, e, a, b), out=out, message=bits, sums=sums)
    return sums[-1]


def subtract_signs(x: Tensor, scale: Tensor) -> None:
    """X -= scale * sign(x), in place."""
    one = scale.to(x.device, torch.float32).reshape(1)
    _run("subtract_signs", x.device, n=len(x), out=x, scales=one)


def sum_signs(messages: Tensor, scales: Tensor | None, factor: float, out: Tensor) -> None:
    """Out = factor * the sum over ranks of scale * sign; a row is a rank's message."""
    given = {"n": len(out), "scales": scales, "factor": factor, "out": out}
    _run("sum_signs", out.device, **_rows(messages), **given)


def vote(messages: Tensor, n: int, signs: Tensor) -> None:
    """The signs of the sum of n signs over ranks; a tie is a plus."""
    _run("vote", signs.device, **_rows(messages), n=n, message=signs)


# ---- rounded at random ---------------------------------------------------------------------------


def code_natural(
    g: Tensor, e: Tensor | None, a: float, b: float, key: Key, out: Tensor, message: Tensor
) -> None:
    """Writes C(x) of natural compression into `message`, and x - C(x) into `out`."""
    given = {**_source(g, e, a, b), **_drawn(key), "out": out, "message": message}
    _run("code_natural", out.device, **given)


def sum_natural(messages: Tensor, factor: float, base: Tensor | None, out: Tensor) -> None:
    """Out = base + factor * the sum over ranks of such messages; a row is a rank's."""
    given = {"n": len(out), "factor": factor, "base": base, "out": out}
    _run("sum_natural", out.device, **_rows(messages), **given)


def code_levels(
    g: Tensor,
    e: Tensor | None,
    a: float,
    b: float,
    key: Key,
    levels: int,
    size: int,
    out: Tensor,
    message: Tensor,
) -> None:
    """Writes C(x) of QSGD into `message`, and x - C(x) into `out`; blocks are of `size` elements.

    Two launches, or three where blocks are longer than 32,768 elements.
    """
    n, device = len(out), out.device
    units = torch.empty(2 * -(-n // size), device=device)
    sums = torch.empty(cuda_module().squares_of(n, size), dtype=torch.float64, device=device)
    given = {**_source(g, e, a, b), **_drawn(key), "out": out, "message": message}
    _run("code_levels", device, **given, levels=levels, block=size, units=units, sums=sums)


def sum_levels(
    messages: Tensor, levels: int, size: int, factor: float, base: Tensor | None, out: Tensor
) -> None:
    """Out = base + factor * the sum over ranks of such messages; a row is a rank's."""
    given = {"n": len(out), "factor": factor, "base": base, "out": out}
    _run("sum_levels", out.device, **_rows(messages), **given, levels=levels, block=size)


# ---- some coordinates ----------------------------------------------------------------------------


def _form(n: int, k: int) -> tuple[bool, dict[str, int]]:
    """Whether it is a bitmap that is sent; bits of a place, and bytes of all places."""
    width = (n - 1).bit_length()
    return n < k * width, {"n": n, "k": k, "width": width, "room": -(-min(k * width, n) // 8)}


def code_top_k(
    g: Tensor, e: Tensor | None, a: float, b: float, k: int, out: Tensor | None, message: Tensor
) -> Tensor:
    """Places and values of the k largest into `message`, x without them into `out`.

    Returns how many numbers are not finite.
    """
    n, device, native = len(g), g.device, cuda_module()
    bitmap, form = _form(n, k)
    x = torch.empty(n, device=device) if out is None else out
    state = torch.zeros(native.search_bytes // 8, dtype=torch.int64, device=device)
    counts = torch.empty(2, native.tiles_of(n), dtype=torch.int64, device=device)
    source = _source(g, e, a, b)
    _run("weigh", device, **{**source, **form}, out=x, state=state, counts=counts)
    index = None if bitmap else torch.empty(k, dtype=torch.int64, device=device)
    ends = counts.cumsum(1)
    _run("emit", device, **form, out=x, state=state, counts=ends, index=index, message=message)
    if index is not None:
        _run("pack", device, **form, index=index, message=message)
    return state[native.spoiled_at // 8]


def sum_top_k(
    messages: Tensor, k: int, factor: float, base: Tensor | None, out: Tensor
) -> tuple[float, Tensor | None]:
    """Puts the sum over ranks of such messages into `out`; a row is a rank's.

    Returns the factor and the base that are left to be taken into account: for bitmaps, none. Of
    places there is a launch per rank, in their order: in one message none comes twice.
    """
    n, device, rows = len(out), out.device, _rows(messages)
    bitmap, form = _form(n, k)
    if not bitmap:
        out.zero_()
        for message in messages:
            _run("scatter", device, **form, messages=message, out=out)
        return factor, base
    size = (len(messages), cuda_module().tiles_of(n))
    counts = torch.empty(size, dtype=torch.int64, device=device)
    _run("count_marks", device, **form, **rows, counts=counts)
    ends = counts.cumsum(1)
    _run("spread", device, **form, **rows, counts=ends, out=out, factor=factor, base=base)
    return 1.0, None


def pack_bits(numbers: Tensor, width: int, out: Tensor) -> None:
    """Numbers (int64) of `width` bits as bytes."""
    if width:
        _run("pack", out.device, k=len(numbers), width=width, index=numbers, message=out)


def code_rand_k(
    g: Tensor,
    e: Tensor | None,
    a: float,
    b: float,
    key: Key,
    factor: float,
    out: Tensor,
    message: Tensor,
) -> None:
    """Values of coordinates that are drawn, times a factor, into `message`; the rest into `out`."""
    given = {**_source(g, e, a, b), **_drawn(key), "out": out, "message": message}
    _run("code_drawn", out.device, **given, k=len(message) // 4, factor=factor)


def add_rand_k(message: Tensor, key: Key, out: Tensor) -> None:
    """Adds one rank's values to those of the ranks before it."""
    given = {"n": len(out), "k": len(message) // 4, "messages": message, "out": out}
    _run("add_drawn", out.device, **given, **_drawn(key))
