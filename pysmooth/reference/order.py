"""The order of a tensor's elements: that of memory, real parts before imaginary ones."""

from __future__ import annotations

import torch
from torch import Tensor


def flatten(x: Tensor) -> Tensor:
    """The elements in the order of memory, real, in the dtype that is computed in."""
    if x.is_complex():
        x = torch.view_as_real(x)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return wide.permute(_order(x)).reshape(-1)


def unflatten(like: Tensor, flat: Tensor) -> Tensor:
    """A new tensor with `like`'s shape, dtype and layout, whose elements in order are `flat`."""
    out = torch.empty_like(like, memory_format=torch.preserve_format)
    real = torch.view_as_real(out) if like.is_complex() else out
    base = torch.view_as_real(like) if like.is_complex() else like
    order = _order(base)
    inverse = [order.index(d) for d in range(base.dim())]
    real.copy_(flat.reshape([base.shape[d] for d in order]).permute(inverse))
    return out


def _order(x: Tensor) -> list[int]:
    """Dimensions, outermost in memory first."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])
