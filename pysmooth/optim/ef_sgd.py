"""SGD with error feedback."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..compressors import Compressor, ScaledSign
from ..engine.recipe import ClipSpec, Recipe
from ..engine.state import state_dtype
from ..reference.compress import scaled_sign
from ._clip import Backend, Norm
from ._precision import Precision, check_residual
from ._residual import CompressedOptimizer, ResidualPolicy, floats
from ._validate import check_below_one, check_flag, check_number


class EFSGD(CompressedOptimizer):
    """SGD that moves by a compressed step and remembers what compression lost (EF14, EF-signSGD).

    Equivalent to::

        for p in params:
            g = p.grad + weight_decay * p
            if momentum:
                momentum_buffer = momentum * momentum_buffer + g
                g = momentum_buffer
            v = residual + lr * g
            c = compressor(v)
            p = p - c
            residual = v - c

    The residual is in the units of the parameter: it stays right when `lr` changes, and
    `p - residual` follows plain SGD to rounding. With `lr = 0` nothing is sent and the residual
    stays.

    `residual(p)` gives a parameter's residual.

    State: `residual`, and `momentum_buffer` with momentum, 4 bytes per parameter each (float32 also
    for 16-bit parameters; 2 for the former with `residual="bf16"`), 8 for float64; both start from
    0. `step`, one number per tensor. With `ScaledSign` the state holds `v`, as `compressor_input`,
    and the `scale` of what was sent, float64 of shape (), instead of their difference: the step
    then writes it once, not twice.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`.
        lr: learning rate, at least 0.
        compressor: one of `pysmooth.compressors`.
        momentum: decay rate of the momentum, in [0, 1).
        weight_decay: coupled: added to the gradient, before momentum and compression; at least 0.
        residual: "bf16" keeps `residual` (`compressor_input`) in 2 bytes per parameter, rounded
            stochastically. v is rounded before it is compressed: what is sent is taken from what is
            kept, and for selecting compressors c + residual == v holds to the bit all the same.
        maximize: ascend instead of descend.
        nonfinite: what to do where a gradient is not finite: "skip" the step (it is counted),
            "raise" `NonFiniteGradientError`, or take such coordinates as "zero". The first two read
            all gradients once more.
        norm: "in_backward": whether gradients are finite is seen in backward, as in
            `pysmooth.ClipSGD`, and the step need not read them for it.
        backend: "auto", "cpu" or "eager".
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters or this compressor.

    Source: arXiv:1901.09847, arXiv:1809.07599.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        compressor: Compressor,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        residual: Literal["fp32", "bf16"] = "fp32",
        maximize: bool = False,
        nonfinite: ResidualPolicy = "skip",
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.set_compressor(compressor)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "residual": residual,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            scope="global",
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
        check_below_one("momentum", group["momentum"])
        check_flag("maximize", group["maximize"])
        check_residual(group)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        hyper = floats(group, "lr", "momentum", "weight_decay")
        momentum = ("momentum_buffer",) if hyper[1] != 0 else ()
        suffix = "_momentum" if momentum else ""
        signs = isinstance(self.compressor, ScaledSign)
        kept = "compressor_input" if signs else "residual"
        return Recipe(
            f"ef_sgd_{'sign' if signs else self.form()}{suffix}",
            hyper if signs else (*hyper, *self.codec()),
            (kept, *momentum),
            ClipSpec(maximize=group["maximize"]),
            counts_steps=True,
            keeps_scale=signs,
            low_states=(kept,) if group["residual"] == "bf16" else (),
        )

    def residual(self, param: Tensor) -> Tensor:
        """What the parameter's updates still owe: a new tensor, in float32 for 16-bit parameters.

        Zero before the first step. `param - residual(param)` follows SGD without compression.

        Raises:
            KeyError: the parameter is not the optimizer's.
        """
        if not any(param is p for p in self._params()):
            raise KeyError("residual: the tensor is not a parameter of this optimizer")
        state = self.state.get(param, {})
        dtype = state_dtype(param)
        if "residual" in state:
            return torch.Tensor.to(state["residual"], dtype, copy=True)
        if "compressor_input" not in state:
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        v = state["compressor_input"].to(dtype)
        real = torch.view_as_real(v) if v.is_complex() else v
        rest = real - scaled_sign(real, state["scale"].to(v.device))
        return torch.view_as_complex(rest) if v.is_complex() else rest
