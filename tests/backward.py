"""What the tests of hooks in backward share."""

from __future__ import annotations

from typing import Any

import torch
from battery import make_params
from torch import Tensor

from pysmooth import ClipSGD

Params = list[torch.nn.Parameter]
Row = list[Tensor]


def backward(params: Params, row: list[Tensor | None], **kwargs: Any) -> None:
    """A backward pass that ends in these gradients."""
    terms = [(p * g.to(p.dtype)).sum() for p, g in zip(params, row, strict=True) if g is not None]
    loss = torch.stack([t.real if t.is_complex() else t for t in terms]).sum()
    loss.backward(**kwargs)


def pair(**kwargs: Any) -> tuple[Params, ClipSGD, Params, ClipSGD]:
    """The same optimizer twice: sums taken in backward, and in the step."""
    kwargs = {"lr": 0.1, "max_norm": 0.5, "momentum": 0.9, **kwargs}
    ours, plain = make_params(), make_params()
    return ours, ClipSGD(ours, norm="in_backward", **kwargs), plain, ClipSGD(plain, **kwargs)


def full(params: list[Any]) -> int:
    """How many have elements: no sums are needed of the others."""
    return sum(p.numel() > 0 for p in params)


def held(param: Tensor) -> int:
    return len(param._post_accumulate_grad_hooks or ())
