"""torch.nn.utils' gradient clipping functions, fused: change one import, keep the loop."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from . import reference
from .engine.backends import available_backends, cuda_module, fastest, native_module
from .engine.checks import check_layout, check_memory

_Tensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: _Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
) -> Tensor:
    """Clips the norm of the gradients of `parameters`, all taken as one vector, in place.

    Equivalent to `torch.nn.utils.clip_grad_norm_`::

        norm = vector_norm([vector_norm(p.grad, norm_type) for p in parameters], norm_type)
        coef = min(1, max_norm / (norm + 1e-6))
        for p in parameters:
            p.grad *= coef

    with three differences: the norm is accumulated and returned in float32 or better whatever the
    gradients' dtype; where nothing has to be clipped the gradients are not rewritten; and the norm
    is the same to the bit for any number of threads.

    Gradients on CPU and on an NVIDIA GPU go through the native kernels, on a GPU without those
    through the Triton backend where it is available (not with `error_if_nonfinite`, nor a
    `norm_type` of 0 or less). All others, and complex ones for a `norm_type` other than 2, go
    through the equivalent torch ops. On a GPU nobody waits, but for `error_if_nonfinite`; a CUDA
    graph can capture the call where the same one ran before.

    Gradients that are DTensors (FSDP2, tensor parallelism) count as the whole tensors that they are
    parts of: sums go over the mesh dimensions on which a gradient is sharded, in one all-reduce per
    process group. All processes get the same bits, as a plain tensor.

    Args:
        parameters: a tensor or an iterable of tensors; those without gradient are passed over.
        max_norm: the norm to clip to, at least 0.
        norm_type: order of the norm: 2, inf, 1, 0, -inf or any other number, as in torch.
        error_if_nonfinite: raise if the norm is infinite or NaN, leaving the gradients alone.
        foreach: accepted for torch's sake; without effect.
        process_group: over which the model's other gradients lie, such as the stages of a pipeline:
            they are counted, too.

    Returns:
        The norm before clipping, a scalar: float32, or float64 if any gradient is.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        ValueError: `max_norm` is negative or NaN; a gradient is sparse; a gradient to be scaled
            overlaps itself or another one in memory (on a GPU, one that might have to be scaled);
            a DTensor holds partial sums. No gradient has been changed.
    """
    is_generator = not isinstance(parameters, Tensor | list | tuple)
    params = _as_list(parameters)
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0; got {max_norm}")
    if is_generator and not params:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
        )
    if process_group is None and _native_norm(params, norm_type, of_grads=True):
        native = native_module()
        try:
            norm, wide, _ = native.clip_grad_norm(
                params, max_norm, norm_type, error_if_nonfinite, torch.get_num_threads()
            )
        except native.UnsupportedError:
            pass  # another device, dtype or kind of tensor
        else:
            total = _scalar(norm, wide)
            if error_if_nonfinite and not math.isfinite(float(total)):
                raise _nonfinite(norm_type)
            return total
    grads = [p.grad for p in params if p.grad is not None]
    if _spread(grads, process_group):
        total = get_total_norm(grads, norm_type, error_if_nonfinite, process_group=process_group)
        clip_grads_with_norm_(params, max_norm, total)
        return total
    if (cuda := _cuda_module(grads, norm_type)) is not None:
        from .engine import cuda_clip

        try:
            total = cuda_clip.clip(grads, max_norm, norm_type, error_if_nonfinite)
        except cuda.UnsupportedError:
            pass
        else:
            if error_if_nonfinite and not math.isfinite(float(total)):
                raise _nonfinite(norm_type)
            return total
    if not error_if_nonfinite and _on_triton(grads, norm_type):
        from .engine import triton_clip

        return triton_clip.clip(grads, max_norm, norm_type)
    total = get_total_norm(grads, norm_type, error_if_nonfinite)
    _scale_in_torch(grads, max_norm, total)
    return total


def get_total_norm(
    tensors: _Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
) -> Tensor:
    """The norm of all `tensors` taken as one vector, as `torch.nn.utils.get_total_norm`.

    Args:
        tensors: a tensor or an iterable of tensors.
        norm_type: order of the norm, as in `clip_grad_norm_`.
        error_if_nonfinite: raise if the norm is infinite or NaN.
        foreach: accepted for torch's sake; without effect.
        process_group: as in `clip_grad_norm_`.

    Returns:
        A scalar: float32, or float64 if any of the tensors is.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        ValueError: a tensor is sparse.
    """
    tensors, norm_type = _as_list(tensors), float(norm_type)
    total: Tensor | None = None
    if process_group is None and _native_norm(tensors, norm_type, of_grads=False):
        native = native_module()
        try:
            norm, wide = native.grad_norm(tensors, norm_type, torch.get_num_threads())
            total = _scalar(norm, wide)
        except native.UnsupportedError:
            pass
    if total is None and _spread(tensors, process_group):
        from .distributed import clip

        total = clip.total_norm(tensors, norm_type, process_group)
    if total is None and (cuda := _cuda_module(tensors, norm_type)) is not None:
        from .engine import cuda_clip

        with suppress(cuda.UnsupportedError):
            total = cuda_clip.total_norm(tensors, norm_type)
    if total is None and _on_triton(tensors, norm_type):
        from .engine import triton_clip

        total = triton_clip.total_norm(tensors, norm_type)
    if total is None:
        for i, t in enumerate(tensors):
            check_layout(t, f"gradient {i}")
        with torch.no_grad():
            total = reference.total_norm(tensors, norm_type)
    if error_if_nonfinite and not math.isfinite(float(total)):
        raise _nonfinite(norm_type)
    return total


def clip_grads_with_norm_(
    parameters: _Tensors,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scales the gradients by min(1, max_norm / (total_norm + 1e-6)), in place.

    As `torch.nn.utils.clip_grads_with_norm_`, for a `total_norm` that was computed apart.

    Args:
        parameters: a tensor or an iterable of tensors; those without gradient are passed over.
        max_norm: the norm to clip to, at least 0.
        total_norm: the norm of the gradients.
        foreach: accepted for torch's sake; without effect.

    Raises:
        ValueError: as in `clip_grad_norm_`.
    """
    max_norm = float(max_norm)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0; got {max_norm}")
    grads = [p.grad for p in _as_list(parameters) if p.grad is not None]
    if not grads:
        return
    if _spread(grads, None):
        from .distributed import clip

        grads = clip.local_parts(grads)
        grads = [g for g in grads if g.numel() > 0]
        if not grads:
            return
    total_norm = total_norm.detach()
    if total_norm.device.type == "cpu" and "cpu" in available_backends():
        native = native_module()
        coef = max_norm / (float(total_norm) + 1e-6)
        if coef >= 1.0:
            return
        try:
            native.scale(grads, coef, torch.get_num_threads())
            return
        except native.UnsupportedError:
            pass
    _scale_in_torch(grads, max_norm, total_norm)


@torch.no_grad()
def _scale_in_torch(grads: list[Tensor], max_norm: float, norm: Tensor) -> None:
    coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if coef.device.type == "cpu" and float(coef) == 1.0:
        return  # nothing to clip; on other devices, finding that out would mean to wait for them
    check_scalable(grads)
    reference.scale_(grads, coef)


def check_scalable(grads: list[Tensor]) -> None:
    """Refuses gradients that cannot be scaled in place."""
    for i, g in enumerate(grads):
        check_layout(g, f"gradient {i}")
    check_memory(
        [(str(i), g) for i, g in enumerate(grads)],
        itself="gradient {} overlaps itself in memory (an expanded tensor?) and cannot be scaled "
        "in place; clone it first",
        shared="gradients {} and {} share memory and cannot be scaled in place",
    )


def _spread(tensors: list[Tensor], process_group: Any) -> bool:
    """Whether other processes have to be asked."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from .distributed import clip

    return clip.spread(tensors, process_group)


def _scalar(norm: float, wide: bool) -> Tensor:
    """The norm beside the gradients, whatever torch.set_default_device says."""
    return torch.tensor(norm, dtype=torch.float64 if wide else torch.float32, device="cpu")


def _as_list(tensors: _Tensors) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return tensors if isinstance(tensors, list) else list(tensors)


def _native_norm(tensors: list[Tensor], norm_type: float, *, of_grads: bool) -> bool:
    """Whether the native kernels define this norm: of complex numbers they know the 2-norm only."""
    if "cpu" not in available_backends():
        return False
    if norm_type == 2.0:
        return True
    values = [t.grad for t in tensors if t.grad is not None] if of_grads else tensors
    return not any(t.is_complex() for t in values)


def _cuda_module(tensors: list[Tensor], norm_type: float) -> types.ModuleType | None:
    """The native CUDA module, if its kernels define this norm of these gradients."""
    if not tensors or fastest(tensors) != "cuda":
        return None
    return None if norm_type != 2.0 and any(t.is_complex() for t in tensors) else cuda_module()


def _on_triton(tensors: list[Tensor], norm_type: float) -> bool:
    """Whether the Triton kernels take these gradients."""
    if fastest(tensors) not in ("cuda", "triton") or "triton" not in available_backends():
        return False
    from .engine import triton_clip

    return triton_clip.takes(tensors, norm_type)


def _nonfinite(norm_type: float) -> RuntimeError:
    return RuntimeError(
        f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be "
        "clipped. To disable this error and scale the gradients by the non-finite norm anyway, "
        "set `error_if_nonfinite=False`"
    )
