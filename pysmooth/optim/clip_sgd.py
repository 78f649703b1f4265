"""SGD with the clip inside the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import ClipMode, ClipSpec, Recipe
from ._base import FusedOptimizer
from ._clip import Clip, NonFinite, Norm, ScopeName, check_clip, clip_spec
from ._precision import Precision
from ._validate import check_flag, check_number

if TYPE_CHECKING:
    from .theory_clip import TheoryClipSGD


class ClipSGD(FusedOptimizer):
    r"""Stochastic gradient descent on clipped gradients, one read of the gradients per pass.

    Equivalent to (for `clip="hard"`, `scope="global"`)::

        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
        coef = min(1, max_norm / (norm + clip_eps))
        for p in params:
            g = coef * p.grad                       # -coef * p.grad to maximize
            g = g + weight_decay * p                # unless decoupled_weight_decay
            m = momentum * m + (1 - dampening) * g  # m = g in the first step
            g = g + momentum * m if nesterov else m
            p = p - lr * weight_decay * p - lr * g  # the middle term only if decoupled

    With `max_norm=None` or `clip="none"` it is `torch.optim.SGD`: fp32 results differ by at most
    two units in the last place of max(\|p\|, \|update\|) per step. State dicts load both ways.

    State: `momentum_buffer` with momentum, 4 bytes per parameter (float32 also for 16-bit
    parameters), 8 for float64. None without.

    Args:
        params: parameters, named parameters, or groups of either, on one device (on several GPUs
            with the CUDA backend). Any dense or strided layout; float32, float64, bfloat16,
            float16, complex64, complex128. The gradient has the parameter's dtype, or float32
            beside 16-bit and float64 parameters, or a 16-bit dtype beside float32 (`grad_dtype`).
        lr: learning rate, a number or a one-element tensor, at least 0.
        max_norm: the clip threshold, in units of the gradient's norm (of the gradient's coordinates
            for "value"). None: no clip ("normalize": 1). `float("inf")` takes the norm, for
            `last_norm()`, and clips nothing.
        clip: what the gradient `g` is multiplied by.

            - "hard": min(1, max_norm / (\|\|g\|\| + clip_eps))
            - "smooth": 1 / (1 + \|\|g\|\| / max_norm)
            - "normalize": max_norm / (\|\|g\|\| + clip_eps), 0 where g = 0
            - "value": each coordinate clamped to [-max_norm, max_norm]; real parameters only
            - "agc": each row by its own min(1, agc_factor * max(\|\|p\|\|, agc_eps) / \|\|g\|\|),
              of Euclidean norms: see `pysmooth.agc_`. `max_norm` must be None.
            - "none": 1
        scope: the norm is taken over all groups together ("global"), each group, or each tensor.
        clip_eps: added to the norm, as in `torch.nn.utils.clip_grad_norm_`; 0 for theory.
        agc_factor, agc_eps: of clip="agc"; `scope` and `norm_type` do not matter to it. The norms
            take two reads, of parameters and gradients.
        momentum: momentum factor, at least 0.
        dampening: dampening of the momentum.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening = 0.
        weight_decay: weight decay, applied after the clip.
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` instead of adding to the
            gradient (as AdamW does).
        maximize: ascend instead of descend.
        nonfinite: what to do if any gradient holds an infinity or NaN. "propagate": carry on, as
            torch does. "skip": leave everything as it is and count it in `skipped_steps()`.
            "raise": leave everything as it is and raise `NonFiniteGradientError`, naming the
            parameters. The last two read every gradient once more where no norm is taken.
        norm_type: order of the norm, positive or `float("inf")`.
        norm: where gradients are read for their norms, on the cpu backend (the eager one reads them
            in the step, whatever is said here).

            - "in_step": in the step.
            - "in_backward": as soon as backward has made each, while it is in cache, by a
              post-accumulate-grad hook; the step then reads gradients once. The bits are the same.
              A gradient that changed after backward is read in the step again. Not for gradients
              that DDP or FSDP reduces. See docs/methods/in-backward.md.
        backend: "cpu" (native kernels), "eager" (plain torch, any device), or "auto", the fastest
            of them for the parameters' device; see `resolved_backend`.
        precision: at most one of these, for the group's bfloat16 and float16 parameters (others are
            not affected; see docs/methods/low-precision.md):

            - `master_weights=True`: steps change a float32 copy, `state[p]["master_param"]`, and
              the parameter is written from it, rounded to nearest. 4 bytes per parameter.
            - `kahan=True`: `state[p]["compensation"]`, of the parameter's dtype, holds what its
              rounding lost; the value is the sum of both. 2 bytes per parameter.
            - `stochastic_rounding=True`: bfloat16 only: rounded up or down at random, right in the
              mean. By a hash of step, tensor and element: runs are reproducible. No memory.

            And `amp="external"`: `torch.amp.GradScaler` unscales gradients before the step, instead
            of the step in registers ("fused"). For callers that refuse to clip the gradients of
            optimizers that unscale for themselves, as Lightning does.
        foreach: accepted, because torch.optim.SGD has it; without effect.
        fused: likewise.
        differentiable: only False.

    Raises:
        ValueError: an argument is out of range, parameters share memory or overlap themselves.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Sources: smooth clipping and the step size eta / (L0 + L1 \|\|g\|\|) under
    (L0,L1)-smoothness, arXiv:1905.11881 and arXiv:2409.14989; clipping under heavy tails,
    arXiv:2505.20817; adaptive gradient clipping, arXiv:2102.06171.
    """

    groups_say_all = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        max_norm: float | None = None,
        clip: Clip = "hard",
        scope: ScopeName = "global",
        clip_eps: float = 1e-6,
        agc_factor: float = 0.01,
        agc_eps: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        norm_type: float = 2.0,
        norm: Norm = "in_step",
        backend: Backend = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not supported: the step writes in place")
        defaults = {
            "lr": lr,
            "max_norm": max_norm,
            "clip": clip,
            "clip_eps": clip_eps,
            "agc_factor": agc_factor,
            "agc_eps": agc_eps,
            "smoothness": None,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
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

    @classmethod
    def from_smoothness(
        cls,
        params: ParamsT,
        L0: float,
        L1: float,
        eta: float = 1.0,
        **kwargs: Any,
    ) -> ClipSGD:
        """(L0,L1)-GD: the step size eta / (L0 + L1 ||g||), 0 where that has no value.

        For L0 > 0 this is `clip="smooth"` with lr = eta / L0 and max_norm = L0 / L1, but evaluated
        directly, so that L0 = 0 (the normalised step eta / L1) works as well.

        Args:
            params: as in the constructor.
            L0: smoothness at stationary points, at least 0; L0 and L1 must not both be 0.
            L1: growth of the smoothness with the gradient's norm, at least 0.
            eta: step size factor, the group's `lr`: learning rate schedulers scale it.
            **kwargs: any other argument of the constructor but `max_norm`, `clip` and `clip_eps`.
        """
        optimizer = cls.__new__(cls)
        optimizer.set_smoothness(params, L0, L1, eta, kwargs)
        return optimizer

    def set_smoothness(
        self, params: ParamsT, L0: float, L1: float, eta: float, kwargs: dict[str, Any]
    ) -> None:
        """Constructs the optimizer as `from_smoothness` says."""
        for name in ("max_norm", "clip", "clip_eps", "lr"):
            if name in kwargs:
                raise TypeError(f"from_smoothness() sets {name} itself")
        pair = _check_smoothness((L0, L1))
        norm = kwargs.pop("norm", "in_step")
        ClipSGD.__init__(self, params, eta, clip="none", **kwargs)
        self.defaults["smoothness"] = pair
        for group in self.param_groups:
            group["smoothness"] = pair
        self.take_norms(norm)

    @staticmethod
    def from_theory(
        params: ParamsT,
        L0: float,
        L1: float,
        *,
        sigma: float,
        R0: float,
        T: int,
        rule: Literal["standard", "implicit", "adaptive"] = "standard",
        **kwargs: Any,
    ) -> TheoryClipSGD:
        """Clipped SGD with step size and threshold from the theory: `TheoryClipSGD`."""
        from .theory_clip import TheoryClipSGD

        return TheoryClipSGD(params, L0, L1, sigma=sigma, R0=R0, T=T, rule=rule, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("lr", group["lr"])
        momentum = check_number("momentum", group["momentum"])
        check_number("weight_decay", group["weight_decay"])
        dampening = check_number("dampening", group["dampening"], low=-math.inf)
        for flag in ("nesterov", "decoupled_weight_decay"):
            check_flag(flag, group[flag])
        if group["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        check_clip(group)
        if group["smoothness"] is not None:
            _check_smoothness(group["smoothness"])

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        momentum = group["momentum"]
        hyper = (
            float(group["lr"]),
            float(momentum),
            float(group["dampening"]),
            float(group["nesterov"]),
            float(group["weight_decay"]),
            float(group["decoupled_weight_decay"]),
        )
        if group["smoothness"] is not None:
            l0, l1 = group["smoothness"]
            clip = ClipSpec(ClipMode.SMOOTHNESS, l0=l0, l1=l1, maximize=group["maximize"])
        else:
            clip = clip_spec(group)
        if momentum == 0:
            return Recipe("sgd", hyper, (), clip)
        return Recipe("sgd_momentum", hyper, ("momentum_buffer",), clip)


def _check_smoothness(pair: Any) -> tuple[float, float]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"smoothness must be a pair of numbers, L0 and L1; got {pair!r}")
    l0, l1 = check_number("L0", pair[0]), check_number("L1", pair[1])
    if l0 == 0 and l1 == 0:
        raise ValueError("L0 and L1 must not both be 0")
    return l0, l1
