"""The EF21 family: the change of the gradient is compressed, not the gradient."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..compressors import Compressor
from ..engine.backends import Backend
from ..engine.recipe import GRADIENT, ClipSpec, Recipe
from ._base import check_scope
from ._clip import Norm, ScopeName
from ._precision import Precision
from ._residual import CompressedOptimizer, ResidualPolicy, floats
from ._validate import check_choice, check_flag, check_number

Init = Literal["compressed", "full", "zero"]


class EF21(CompressedOptimizer):
    """EF21 on one worker: an estimate follows the gradient through a compressor.

    Equivalent to::

        for p in params:
            g = p.grad
            if eta is not None:                       # EF21-SGDM
                momentum_buffer = (1 - eta) * momentum_buffer + eta * g
                g = momentum_buffer
            grad_estimate = grad_estimate + compressor(g - grad_estimate)
        norm = norm of all grad_estimates if normalize else 1
        for p in params:
            p = p - lr * weight_decay * p - lr * grad_estimate / norm

    An estimate of norm 0 moves nothing. With `normalize` every step has length `lr`: norm-EF21 and
    norm-EF21-SGDM, for (L0,L1)-smooth functions. `eta` is the weight of the new gradient, not
    torch's `momentum`.

    State: `grad_estimate`, and `momentum_buffer` with `eta`, 4 bytes per parameter each (float32
    also for 16-bit parameters), 8 for float64. `step`, one number per tensor.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: step size, or length of the step with `normalize`; at least 0.
        compressor: one of `pysmooth.compressors`.
        normalize: divide the step by the estimate's norm.
        eta: weight of the new gradient in the momentum, in (0, 1]; None: no momentum.
        init: the estimate before the first step: "compressed": 0, so that the first step leaves it
        at
            compressor(g); "full": the first gradient. In both the momentum starts from the first
            gradient. "zero": both start from 0.
        weight_decay: decoupled: the parameter shrinks by `lr * weight_decay`, times itself.
        scope: over what the norm is taken: "global" (all groups together), "group" or "tensor".
        maximize: ascend instead of descend.
        nonfinite: what to do where a gradient is not finite: "skip" the step (it is counted),
        "raise"
            `NonFiniteGradientError`, or take such coordinates as "zero". The first two read all
            gradients once more.
        norm: "in_backward": whether gradients are finite is seen in backward, as in
            `pysmooth.ClipSGD`, and the step need not read them for it.
        backend: "auto", "cpu" or "eager".
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters or this compressor.

    Source: arXiv:2106.05203, arXiv:2305.15155 (SGDM), arXiv:2410.16871 (normalised).
    """

    momenta = 1  # how many there are, given an eta

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        compressor: Compressor,
        *,
        normalize: bool = False,
        eta: float | None = None,
        init: Init = "compressed",
        weight_decay: float = 0.0,
        scope: ScopeName = "global",
        maximize: bool = False,
        nonfinite: ResidualPolicy = "skip",
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.set_compressor(compressor, check_scope(scope))
        self.normalize = normalize
        self.init = check_choice("init", init, ("compressed", "full", "zero"))
        check_flag("normalize", normalize)
        defaults = {"lr": lr, "eta": eta, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            defaults,
            scope=scope,
            nonfinite=nonfinite,
            norm_type=2.0,
            norm=norm,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        if group["eta"] is not None and check_number("eta", group["eta"], strict=True) > 1:
            raise ValueError(f"eta must be in (0, 1]; got {float(group['eta'])}")
        check_flag("maximize", group["maximize"])

    def rule(self, momenta: int) -> str:
        """The name of the rule for so many momenta."""
        form = self.form()
        if form == "select" and self.normalize:
            form = "select_normalized"
        return f"ef21_{form}" + ("", "_m", "_2m")[momenta]

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        eta = 1.0 if group["eta"] is None else float(group["eta"])
        momenta = 0 if group["eta"] is None else self.momenta
        states = ("grad_estimate", "momentum_buffer", "second_momentum_buffer")[: 1 + momenta]
        lr, weight_decay = floats(group, "lr", "weight_decay")
        start: float | str = 0.0 if self.init == "zero" else GRADIENT
        return Recipe(
            self.rule(momenta),
            (lr, eta, weight_decay, float(self.normalize), *self.compression()),
            states,
            ClipSpec(maximize=group["maximize"]),
            counts_steps=True,
            init=(GRADIENT if self.init == "full" else 0.0, start, start)[: 1 + momenta],
            scales_blocks=self.compressor.scale_block is not None,
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_ef21"] = (self.normalize, self.init)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_ef21" in state:
            self.normalize, self.init = state.pop("_ef21")
        super().__setstate__(state)


class EF21SGDM(EF21):
    """`EF21` with momentum: `eta` is 0.1 by default; everything else is as there."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        compressor: Compressor,
        *,
        eta: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, compressor, eta=eta, **kwargs)


class NormEF21(EF21):
    """`EF21` with normalised steps, for (L0,L1)-smooth functions; everything else is as there."""

    def __init__(
        self, params: ParamsT, lr: float | Tensor, compressor: Compressor, **kwargs: Any
    ) -> None:
        super().__init__(params, lr, compressor, normalize=True, **kwargs)


class NormEF21SGDM(EF21):
    """`EF21` with momentum and normalised steps; `eta` is 0.1 by default."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        compressor: Compressor,
        *,
        eta: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, compressor, normalize=True, eta=eta, **kwargs)


class EF21SGD2M(EF21):
    """`EF21` with two momenta, one after the other, before the compressor.

    Where `EF21` follows `momentum_buffer`, this follows::

        second_momentum_buffer = (1 - eta) * second_momentum_buffer + eta * momentum_buffer

    State: 4 bytes per parameter more than `EF21` with momentum. Everything else is as there.

    Source: arXiv:2305.15155, appendix.
    """

    momenta = 2

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        compressor: Compressor,
        *,
        eta: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, compressor, eta=eta, **kwargs)


class EF21Plus(EF21):
    """`EF21` that sends the better of two messages (EF21+).

    Per unit of the compressor's scope the estimate becomes compressor(g) where that is closer to g
    than grad_estimate + compressor(g - grad_estimate) is; of equals the latter. Everything else is
    as in `EF21`. `TopK(scope="block")` chooses per tensor.

    Source: arXiv:2106.05203.
    """

    messages = 2
    errors = 2

    def rule(self, momenta: int) -> str:
        """The name of the rule for so many momenta."""
        return "ef21_plus" + ("", "_m")[momenta]
