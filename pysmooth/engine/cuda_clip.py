"""clip_grad_norm_ and get_total_norm on the CUDA backend: the pipeline with the rule "scale"."""

from __future__ import annotations

import math
import types
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import cuda_module
from .cuda import refuse_in_capture
from .cuda_memory import PlanMemory, run_on_all, sites_of

if TYPE_CHECKING:
    from .._cuda import ClipPlan, Part

_PLANS: list[_Clip] = []  # the last one used comes first
_CAPTURED: list[_Clip] = []  # graphs launch kernels on their memory
_MOST = 8  # plans that are kept: models differ, and so do the orders of norms
_LOCK = Lock()  # from the launches of a call to the copy of its norm


class _Clip:
    """A plan for gradients of certain forms, and its memory on their devices."""

    def __init__(self, native: types.ModuleType, tensors: list[Tensor], norm_type: float) -> None:
        self.device, self.norm_type = tensors[0].device, norm_type
        refuse_in_capture(self.device)
        sites, devices = sites_of(tensors)
        self.plan: ClipPlan = native.ClipPlan(tensors, norm_type, sites)
        self.memories = [PlanMemory(*pair) for pair in zip(self.plan.sites, devices, strict=True)]
        at = self.plan.sites[0].norm_at
        self.norm = self.memories[0].plan[at : at + 8].view(torch.float64)[0]

    def is_free(self) -> bool:
        """Whether a launch now keeps its distance from others."""
        return all(memory.is_free() for memory in self.memories)

    def run(self, tensors: list[Tensor], max_norm: float, part: Part, writes: bool) -> bool:
        """Enqueues the part; False if the plan is for other gradients."""
        if not self.plan.begin(tensors, writes):
            return False

        def launch(site: int, phase: int, inputs: int, stream: int) -> int:
            return self.plan.run(site, phase, max_norm, part, inputs, stream)

        def keep() -> None:
            if self not in _CAPTURED:
                _CAPTURED.append(self)

        run_on_all(self.memories, launch, keep)
        if writes and part != cuda_module().Part.NORMS:
            self.plan.written(tensors)
        return True

    def result(self) -> Tensor:
        """The norm, beside the gradients, in memory of its own."""
        return self.norm.to(torch.float64 if self.plan.is_wide else torch.float32, copy=True)


@torch.no_grad()
def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all tensors, on their device; nobody waits."""
    with _LOCK:
        return _begin(tensors, norm_type, 0.0, cuda_module().Part.NORMS, False).result()


@torch.no_grad()
def clip(
    tensors: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """The norm; then the tensors are scaled to it, in place, unless that would change nothing.

    Nobody waits, but for `error_if_nonfinite`: where the norm that is returned is not finite, the
    tensors are then left as they are.
    """
    part = cuda_module().Part
    with _LOCK:
        first = part.NORMS if error_if_nonfinite else part.WHOLE
        plan = _begin(tensors, norm_type, max_norm, first, True)
        norm = plan.result()
        if error_if_nonfinite and math.isfinite(float(norm)):
            plan.run(tensors, max_norm, part.REST, True)
    return norm


def _begin(
    tensors: list[Tensor], norm_type: float, max_norm: float, part: Part, writes: bool
) -> _Clip:
    """Runs the part with the plan of these tensors. Their addresses come anew with every call."""
    device = tensors[0].device
    for known in _PLANS:
        alike = known.device == device and known.norm_type == norm_type and known.is_free()
        if alike and known.run(tensors, max_norm, part, writes):
            plan = known
            break
    else:
        plan = _Clip(cuda_module(), tensors, norm_type)
        if not plan.run(tensors, max_norm, part, writes):
            raise RuntimeError("gradients changed while their norm was taken")
    _PLANS[:] = [plan, *(known for known in _PLANS if known is not plan)][:_MOST]
    return plan
