"""`torch.amp.GradScaler` for parameters that lie on several processes."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import mesh_groups


class GradScaler(torch.amp.GradScaler):
    """A `torch.amp.GradScaler` whose overflows are those of all processes that train a model.

    torch's own, given DTensors, asks the processes along those mesh dimensions that cut up the
    first gradient. Where others lie on more dimensions (FSDP2 with tensor parallelism, a layer of
    which is not parallel), some processes would skip a step that others make; where some are plain
    tensors it raises. This one asks along all dimensions of all meshes, and takes both.

    Everything else is torch's: `scale`, `unscale_`, `step`, `update`.

    Args:
        args: those of `torch.amp.GradScaler`.
        process_group: over which other parameters of the same model lie, such as the stages of a
            pipeline; None: there are no others.
        kwargs: those of `torch.amp.GradScaler`.
    """

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._process_group = process_group

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        here = cast("torch.optim.Optimizer", _Here(params))
        found = super()._unscale_grads_(here, inv_scale, found_inf, allow_fp16)
        total = torch.zeros_like(found_inf)
        for flag in found.values():
            total += flag.to(total.device)
        groups = mesh_groups(params)
        if self._process_group is not None:
            groups.append(self._process_group)
        for group in groups:
            dist.all_reduce(total, dist.ReduceOp.MAX, group=group)
        return {total.device: total}


class _Here:
    """An optimizer's gradients as far as they are here; all that is read of it."""

    def __init__(self, params: list[Tensor]) -> None:
        self.param_groups = [{"params": [_part(p) for p in params]}]


@torch.no_grad()
def _part(p: Any) -> Tensor:
    """A tensor whose gradient is the local part of another one's."""
    from torch.distributed.tensor import DTensor

    if not isinstance(p.grad, DTensor):
        return cast(Tensor, p)
    local: Any = p.grad._local_tensor
    local = local.wait() if hasattr(local, "wait") else local
    part: Tensor = local.detach()
    part.grad = local
    return part
