"""Adaptive gradient clipping as a function, for use with any optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import reference
from ._clip_grad import check_scalable
from .engine.backends import available_backends, native_module
from .engine.checks import check_gradient
from .engine.recipe import ClipMode, ClipSpec
from .optim._validate import check_number


def agc_(parameters: Tensor | Iterable[Tensor], factor: float = 0.01, eps: float = 1e-3) -> None:
    """Clips each row of the gradients to a multiple of the same row's norm in the parameter.

    Equivalent to::

        for p in parameters:
            rows = list(zip(p, p.grad)) if p.dim() >= 2 else [(p, p.grad)]
            for row, grad in rows:
                grad *= min(1, factor * max(row.norm(), eps) / grad.norm())

    A row is a slice along the first dimension: the weights of one output of a `Linear` or a
    convolution, one word of an `Embedding`. A vector or a single number is one row. (Weights of a
    transposed convolution begin with the input: their rows are those of one input.) A gradient row
    of zeros stays as it is; one that holds an infinity or a NaN becomes NaN there, and no other row
    does.

    CPU gradients go through the native kernels, all others through the equivalent torch ops. To
    have it inside the step, pass `clip="agc"` to an optimizer.

    Args:
        parameters: a tensor or an iterable of tensors; those without gradient are passed over.
        factor: the norm of a gradient's row in units of the parameter's, greater than 0: lambda in
            the paper, which takes 0.01 for large batches, more for small ones.
        eps: the least that counts as a parameter's norm, at least 0: rows of zeros could not move.

    Raises:
        ValueError: an argument is out of range; a gradient is sparse, has another shape than its
            parameter, overlaps itself or another one in memory. No gradient has been changed.

    Source: arXiv:2102.06171.
    """
    factor = check_number("factor", factor, strict=True, infinite=True)
    eps = check_number("eps", eps)
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if "cpu" in available_backends():
        native = native_module()
        try:
            native.agc(params, factor, eps, torch.get_num_threads())
            return
        except native.UnsupportedError:
            pass
    _agc_in_torch(params, ClipSpec(ClipMode.AGC, factor, eps))


@torch.no_grad()
def _agc_in_torch(params: list[Tensor], clip: ClipSpec) -> None:
    live = [(p, p.grad) for p in params if p.grad is not None]
    for i, (p, _) in enumerate(live):
        check_gradient(p, str(i))
    check_scalable([g for _, g in live])
    for p, g in live:
        if g.numel() > 0:
            rows = reference.agc_coefficients(clip, p, g, 1.0)
            reference.scale_([g], rows[..., 0] if g.is_complex() and rows.dim() else rows)
