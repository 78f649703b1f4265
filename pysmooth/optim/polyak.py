"""Polyak's step size: how far the loss is from its least value, over the squared gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ._clip import NonFinite
from ._host_step import HostStepOptimizer, norm_of
from ._precision import Precision
from ._validate import check_number

Loss = float | Tensor


class PolyakSGD(HostStepOptimizer):
    r"""Gradient descent with Polyak's step size (GD-PS, SGD-PS, SPS_max).

    Equivalent to::

        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
        step_size = (loss - f_star) / (c * norm**2 + eps)   # (f_star - loss) to maximize
        step_size = min(step_size, max_step, growth * last_step)
        for p in params:
            p = p - lr * step_size * p.grad                 # + to maximize

    A loss on the wrong side of `f_star`, and a gradient of norm 0, move nothing, and `last_step`
    stays as it was.

    - GD-PS: the whole loss and its least value. Needs no constant of the function.
    - SGD-PS: a batch's loss and that batch's own least value: `f_star=0` for models that can fit
      every sample, else pass the loss less it.
    - SPS_max: `c=0.5` and a finite `max_step`. In its authors' experiments a smoothed bound takes
      that place, `growth=2 ** (batch / samples)`, `first_step=1`, `eps=1e-8`; where the gradient
      vanishes their step size is 0 from then on, this one goes on.

    The loss comes from the closure, `optimizer.step(closure)`, or from `step(loss=...)`. It is
    read on the host. The step reads gradients for the norm, and moves in one pass.

    State: none. The step size is in `param_groups[i]["step_size"]`.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        f_star: the least value of the loss (the largest, to maximize), a finite number. A group's
            own for scope "group".
        c: greater than 0; 1 is Polyak's step, 1/2 the one of SPS for convex losses.
        max_step: the largest step size, greater than 0.
        growth: the largest ratio of a step size to the one before, at least 1; infinite: none.
        first_step: the step size before the first one, greater than 0; for a finite `growth`.
        eps: added to the squared norm, at least 0.
        lr: factor of the step size, at least 0: learning rate schedulers scale it.
        scope: "global": one loss and one step size for all groups; "group": each its own, so that
            `loss` is a sequence of one loss per group, for independent runs in one optimizer.
        maximize: ascend instead of descend.
        nonfinite, backend, precision: as in `pysmooth.ClipSGD`; `amp` is "external".

    Raises:
        ValueError: an argument is out of range, a step has no loss, or not one per group.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: GD-PS and SGD-PS under (L0,L1)-smoothness, arXiv:2409.14989; SPS_max, arXiv:2002.10542,
    the smoothed bound as in its authors' code.
    """

    memory = {"last_step": None}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        f_star: float = 0.0,
        *,
        c: float = 1.0,
        max_step: float = math.inf,
        growth: float = math.inf,
        first_step: float = 1.0,
        eps: float = 0.0,
        lr: float | Tensor = 1.0,
        scope: str = "global",
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self._losses: list[float] = []
        defaults = {"lr": lr, "f_star": f_star, "c": c, "max_step": max_step, "eps": eps}
        super().__init__(
            params,
            {**defaults, "growth": growth, "first_step": first_step},
            scope=scope,
            maximize=maximize,
            nonfinite=nonfinite,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        super().check_group(group)
        check_number("f_star", group["f_star"], low=-math.inf)
        for name in ("c", "first_step"):
            check_number(name, group[name], strict=True)
        check_number("max_step", group["max_step"], strict=True, infinite=True)
        check_number("growth", group["growth"], low=1.0, infinite=True)
        check_number("eps", group["eps"])

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Loss | Sequence[Loss] | None = None,
    ) -> Any:
        """Performs one step.

        Args:
            closure: reevaluates the model, calls backward, and returns the loss.
            loss: the loss where the gradients were taken, if there is no closure; a sequence with
                one per group for scope "group".

        Returns:
            The loss.
        """
        if (closure is None) == (loss is None):
            raise ValueError("step() needs either a closure or loss=...: the step size is made of")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._descend(loss)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _descend(self, loss: Any) -> None:
        self._losses = self._as_list(loss)
        self._run()

    def _as_list(self, loss: Any) -> list[float]:
        # In this order: to Python a tensor is a sequence only after a long search.
        several = loss.dim() == 1 if isinstance(loss, Tensor) else isinstance(loss, Sequence)
        out = [float(x) for x in loss] if several else [float(loss)]
        count = len(self.units())
        if len(out) != count:
            raise ValueError(f"loss must have one value per group, {count}; got {len(out)}")
        return out

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """Polyak's."""
        g, norm = groups[0], norm_of(self.gradients(groups))
        gap = self._losses[unit] - float(g["f_star"])
        gap = -gap if g["maximize"] else gap
        below = float(g["c"]) * norm * norm + float(g["eps"])
        if norm == 0 or gap <= 0:
            return {"step_size": 0.0}
        # The square of a tiny norm may be 0, that of a large one infinite.
        size = gap / below if below != 0 else math.inf
        last = float(g["first_step"]) if g["last_step"] is None else g["last_step"]
        size = min(size, float(g["max_step"]), float(g["growth"]) * last) if size == size else size
        if math.isinf(size) and math.isfinite(norm):
            return {"step_size": 0.0}
        return {"step_size": size, "last_step": size}
