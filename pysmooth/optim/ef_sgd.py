"""SGD with error feedback."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .._errors import NonFiniteGradientError
from ..compressors import Compressor, ScaledSign
from ..engine.backends import Backend
from ..engine.checks import check_gradient
from ..engine.recipe import ABSORBED, ClipMode, ClipSpec, Policy, Recipe
from ..engine.state import state_dtype
from ..reference.compress import scaled_sign
from ._clip import Clip, Norm, ScopeName, check_clip, clip_spec
from ._hooks import GradientHooks
from ._managed import refuse_managed
from ._precision import Precision, check_residual
from ._residual import CompressedOptimizer, ResidualPolicy, floats
from ._validate import check_below_one, check_flag, check_number


class EFSGD(CompressedOptimizer):
    """SGD that moves by a compressed step and remembers what compression lost (EF14, EF-signSGD).

    Equivalent to (`clip` as in `pysmooth.ClipSGD`)::

        for p in params:
            g = clip(p.grad) + weight_decay * p
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

    With `absorb=True` the residual takes the gradient's memory: as soon as backward has made a
    gradient it is added to the residual, and freed (`p.grad` is None after backward)::

        residual += lr * (p.grad + weight_decay * p)    # in backward; the last term once a step
        p.grad = None

        c = compressor(residual)                        # in step(), where there was a gradient
        p = p - c
        residual = residual - c

    One backward pass per step gives the same bits as without. Several add up: each gradient with
    the `lr` that its group has when backward makes it. What was absorbed cannot be taken back:

    - a step that is left out sends later what it would have sent;
    - `zero_grad()` between backward and step raises `RuntimeError`;
    - `nonfinite` looks at each gradient by itself: "skip" drops it, the others stay (one more in
      `skipped_steps()`); "raise" raises out of `backward()` and leaves it in `p.grad`. On a GPU,
      where the host does not wait, it drops it, and raises when the host next reads something;
    - `state_dict()` between backward and step is exact: `absorbed` counts, per parameter, the
      gradients taken in since the last step;
    - a gradient that was set by hand is absorbed by `step()`, after a look at all of these: if one
      is not finite the policy holds for the whole step;
    - `step()` sends nothing while `lr` is 0; the residual keeps what it has.

    Not with momentum, a clip, `norm="in_backward"`, gradients that DDP or FSDP reduces, or
    `torch.amp.GradScaler`, whose scale nobody knows in backward: `step()` refuses it.

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
        absorb: add gradients to the residual in backward, and free them.
        max_norm, clip, scope, clip_eps, agc_factor, agc_eps, norm_type: the clip inside the step,
            as in `pysmooth.ClipSGD`: of the gradient, before it meets the residual.
        maximize: ascend instead of descend.
        nonfinite: what to do where a gradient is not finite: "skip" the step (it is counted),
            "raise" `NonFiniteGradientError`, or take such coordinates as "zero" (not with a clip
            that takes norms). The first two read all gradients once more, as norms do.
        norm: "in_backward": norms, and whether gradients are finite, are seen in backward, as in
            `pysmooth.ClipSGD`, and the step need not read them for it.
        backend: "auto", "cpu", "cuda", "triton" or "eager".
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
        absorb: bool = False,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
        clip_eps: float = 1e-6,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        maximize: bool = False,
        nonfinite: ResidualPolicy = "skip",
        norm_type: float = 2.0,
        norm: Norm = "in_step",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        self.set_compressor(compressor)
        check_flag("absorb", absorb)
        self.absorbs = absorb
        if absorb and norm == "in_backward":
            raise ValueError(
                "absorb=True does not go with norm='in_backward': it looks at gradients in "
                "backward already"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "residual": residual,
            "max_norm": max_norm,
            "clip": clip,
            "clip_eps": clip_eps,
            "agc_factor": agc_factor,
            "agc_eps": agc_eps,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            scope=scope,
            nonfinite=nonfinite,
            norm_type=norm_type,
            norm=norm,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        check_below_one("momentum", group["momentum"])
        if self.absorbs and group["momentum"] != 0:
            raise ValueError(_NO_MOMENTUM)
        check_clip(group)
        spec = clip_spec(group)
        if self.absorbs and spec != ClipSpec(maximize=spec.maximize):
            raise ValueError(
                "absorb=True does not go with a clip: gradients are taken in before their norm is "
                "known"
            )
        self._check_zero(group, spec)
        check_residual(group)

    def _check_zero(self, group: dict[str, Any], spec: ClipSpec) -> None:
        if spec.mode != ClipMode.NONE and self.policy == Policy.ZERO:
            raise ValueError(
                f"nonfinite='zero' does not go with clip={group['clip']!r}, whose norm would hold "
                "what is not finite"
            )

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        hyper = floats(group, "lr", "momentum", "weight_decay")
        if self.absorbs and hyper[1] != 0:  # it came after the group was checked
            raise ValueError(_NO_MOMENTUM)
        momentum = ("momentum_buffer",) if hyper[1] != 0 else ()
        suffix = "_momentum" if momentum else ""
        signs = isinstance(self.compressor, ScaledSign)
        kept = "compressor_input" if signs else "residual"
        clip = clip_spec(group)
        self._check_zero(group, clip)  # it, too
        return Recipe(
            f"ef_sgd_{'sign' if signs else self.form()}{suffix}",
            hyper if signs else (*hyper, *self.compression()),
            (kept, *momentum),
            clip,
            counts_steps=True,
            keeps_scale=signs,
            low_states=(kept,) if group["residual"] == "bf16" else (),
            scales_blocks=self.compressor.scale_block is not None,
        )

    # ---- absorb --------------------------------------------------------------------------------

    def follow_params(self) -> None:
        """Puts the hooks on the parameters that the groups hold now."""
        if not self.absorbs:
            return super().follow_params()
        params = self._params()
        refuse_managed(params, "absorb=True")
        if self._hooks is None:
            owner = weakref.ref(self)
            self._hooks = GradientHooks(self, lambda: _Absorb(owner))
        return self._hooks.follow(params)

    def absorbing(self, group: dict[str, Any], *, first: bool) -> Recipe:
        """What is done with one gradient: only the first of a step decays."""
        recipe = self._recipe(self._readable(group))
        if first:
            return recipe
        lr, momentum, _, *compression = recipe.hyper
        return recipe._replace(hyper=(lr, momentum, 0.0, *compression))

    def absorb_gradient(self, param: Tensor) -> None:
        """Adds the parameter's gradient to its residual, and frees it. What the hooks do.

        Raises:
            NonFiniteGradientError: it is not finite, and the policy is "raise".
        """
        if param.grad is None:
            return
        if not self._ready_engine().absorb(self, param):
            if self.policy == Policy.RAISE:
                raise NonFiniteGradientError(f"non-finite gradient in {self._label(param)!r}")
            self.count_skipped()
        param.grad = None

    def absorb_rest(self) -> bool:
        """Absorbs the gradients that did not come from backward; False where the policy says so."""
        rest = [p for p in self._params() if p.grad is not None]
        if rest and rest[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a gradient that was set by hand cannot be absorbed while a CUDA graph is captured"
            )
        if rest and self.policy.asks_first:
            bad = []
            for p in rest:
                check_gradient(p, self._label(p))
                if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                    bad.append(self._label(p))
            if bad and self.policy == Policy.RAISE:
                raise NonFiniteGradientError("non-finite gradient in " + ", ".join(map(repr, bad)))
            if bad:
                self.count_skipped()
                return False
        for p in rest:
            self.absorb_gradient(p)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With `absorb=True` not between backward and step.

        Raises:
            RuntimeError: gradients were absorbed that no step has sent yet.
        """
        if self.absorbs and self._has_absorbed():
            self._settle()  # a device may have kept them out
        if self.absorbs and self._has_absorbed():
            raise RuntimeError(
                "zero_grad() cannot take back the gradients that absorb=True has added to the "
                "residual; call step() first"
            )
        super().zero_grad(set_to_none)

    def _has_absorbed(self) -> bool:
        return any(held.get(ABSORBED, 0) for held in self.state.values())

    def _label(self, param: Tensor) -> str:
        every = zip(self._params(), self.param_labels(), strict=True)
        return next(label for p, label in every if p is param)

    # ---- the residual --------------------------------------------------------------------------

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


_NO_MOMENTUM = (
    "absorb=True does not go with momentum: several gradients of one step would each decay it, and "
    "its buffer takes the memory that absorbing frees"
)


class _Absorb:
    """A parameter's hook. It refers to the optimizer weakly."""

    def __init__(self, owner: weakref.ref[EFSGD]) -> None:
        self._owner = owner

    def __call__(self, param: Tensor) -> None:
        optimizer = self._owner()
        if optimizer is not None:
            optimizer.absorb_gradient(param)
