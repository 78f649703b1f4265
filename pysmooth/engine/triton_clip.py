"""clip_grad_norm_ and get_total_norm on the Triton backend: the pipeline with the rule "scale"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..reference.clip import norm_dtype
from ..triton_kernels.how import STORED
from ..triton_kernels.plan import Plan, Slot
from ..triton_kernels.specs import Method
from ..triton_kernels.words import group_words, packed
from .checks import check_memory
from .recipe import ClipMode, ClipSpec

_PLANS: dict[object, Plan] = {}
_CAPTURED: list[Plan] = []  # these have tables that graphs read
_MOST = 8  # plans that are kept: models differ, and so do the orders of norms


def takes(tensors: Sequence[Tensor], norm_type: float) -> bool:
    """Whether the kernels define this norm of these tensors."""
    return (
        norm_type > 0
        and len(tensors) > 0
        and all(t.device == tensors[0].device for t in tensors)
        and all(t.layout is torch.strided and not t.is_neg() and not t.is_conj() for t in tensors)
        and all(_real(t).dtype in STORED and (t.numel() == 0 or t.data_ptr() != 0) for t in tensors)
        and (norm_type == 2.0 or not any(t.is_complex() for t in tensors))
    )


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of all tensors, on their device; nobody waits."""
    plan = _plan(tensors, norm_type)
    _run(plan, tensors, 1.0, 0)
    norm: Tensor = plan.norms[0].to(norm_dtype(tensors), copy=True)
    return norm


@torch.no_grad()
def clip(tensors: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """The norm; then the tensors are scaled to it, in place, unless that would change nothing."""
    _check_writable(tensors)
    plan = _plan(tensors, norm_type)
    _run(plan, tensors, max_norm, 0)
    norm: Tensor = plan.norms[0].to(norm_dtype(tensors), copy=True)
    _run(plan, tensors, max_norm, 1)
    torch.autograd.graph.increment_version(tensors)
    return norm


def _run(plan: Plan, tensors: Sequence[Tensor], max_norm: float, part: int) -> None:
    row = group_words((1.0,), ClipSpec(ClipMode.HARD, max_norm, 1e-6), counts=False)
    addresses = packed(t.data_ptr() if t.numel() else 0 for t in tensors)
    if plan.run(addresses, row, passes=(part,)) and plan not in _CAPTURED:
        _CAPTURED.append(plan)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _plan(tensors: Sequence[Tensor], norm_type: float) -> Plan:
    """The plan of tensors of these forms; their addresses come anew with every call."""
    forms = tuple((t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0) for t in tensors)
    key = (tensors[0].device, norm_type, forms)
    plan = _PLANS.get(key)
    if plan is None:
        slots = [Slot("scale", 0, real, real, []) for real in map(_real, tensors)]
        method = Method(
            scope=0, asks=False, names=False, zero=False, norm_type=norm_type, reduces=True
        )
        plan = Plan(slots, 1, method, tensors[0].device)
        while len(_PLANS) >= _MOST:
            _PLANS.pop(next(iter(_PLANS)))
        _PLANS[key] = plan
    return plan


def _check_writable(tensors: Sequence[Tensor]) -> None:
    """No element is scaled twice. The usual case, dense blocks apart from each other, is quick."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in tensors)
    apart = all(a[1] <= b[0] for a, b in pairwise(spans))
    if not apart or not all(t.is_contiguous() for t in tensors):
        check_memory(
            [(str(i), g) for i, g in enumerate(tensors)],
            itself="gradient {} overlaps itself in memory (an expanded tensor?) and cannot be "
            "scaled in place; clone it first",
            shared="gradients {} and {} share memory and cannot be scaled in place",
        )
