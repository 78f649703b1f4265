"""The parts that optimizers are put together from, each with its few lines of torch.

A part turns an update u, at first the gradient, into another one; after the last one
`p = p - lr * u`. Parts are immutable values: they hold settings, an optimizer holds their states.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import reference
from ..compressors import Compressor, ScaledSign
from ..engine.recipe import NORM_SQ, SCALE, ClipMode, ClipSpec
from ..optim._base import check_scope
from ..optim._validate import check_below_one, check_choice, check_flag, check_number
from ..optim.adam import check_betas
from ..reference.compress import scaled_sign
from .base import Part, Run, norms

ScopeName = Literal["global", "group", "tensor"]
Start = Literal["zero", "first"]


@dataclass(frozen=True)
class Clip(Part):
    """u = coef * u, with `coef` as `pysmooth.ClipSGD` has it for `clip=mode`; "value" clamps.

    Args:
        max_norm: the threshold, greater than 0.
        mode: "hard", "smooth", "normalize" or "value".
        scope: of the norm: "global", "group" or "tensor".
        eps: added to the norm, at least 0.
        norm_type: order of the norm, greater than 0.
    """

    max_norm: float
    mode: Literal["hard", "smooth", "normalize", "value"] = "hard"
    _: KW_ONLY
    scope: ScopeName = "global"
    eps: float = 1e-6
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        check_number("max_norm", self.max_norm, strict=True)
        check_choice("mode", self.mode, ("hard", "smooth", "normalize", "value"))
        check_scope(self.scope)
        check_number("eps", self.eps)
        check_number("norm_type", self.norm_type, strict=True)
        if self.mode == "normalize" and self.max_norm == math.inf:
            raise ValueError("max_norm must be finite for mode='normalize'")

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Scales, or clamps."""
        if self.mode == "value":
            if any(m.is_complex for m in run.members):
                raise ValueError("Clip(mode='value') has no meaning for complex parameters")
            return [u.clamp(-self.max_norm, self.max_norm) for u in us]
        spec = ClipSpec(ClipMode[self.mode.upper()], self.max_norm, self.eps)
        found = norms(us, run, self.scope, self.norm_type)
        return [
            u * reference.clip_coefficient(spec, norm).to(u.dtype)
            for u, norm in zip(us, found, strict=True)
        ]


@dataclass(frozen=True)
class AdaptiveClip(Part):
    r"""Each row of u by its own min(1, factor * max(\|\|row of p\|\|, eps) / \|\|row of u\|\|).

    Args:
        factor: of the parameter's norm, greater than 0.
        eps: the least norm that a row of p counts as.

    Source: arXiv:2102.06171 (adaptive gradient clipping).
    """

    factor: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_number("factor", self.factor, strict=True)
        check_number("eps", self.eps)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Scales rows."""
        spec = ClipSpec(ClipMode.AGC, self.factor, self.eps)
        out = []
        for u, m in zip(us, run.members, strict=True):
            pair = (m.p, u)
            if m.is_complex:
                pair = (torch.view_as_complex(m.p), torch.view_as_complex(u.contiguous()))
            out.append(u * reference.agc_coefficients(spec, *pair, 1.0).to(u.dtype))
        return out


@dataclass(frozen=True)
class Decay(Part):
    """u = u + weight_decay * p; decoupled: p shrinks by lr * weight_decay * p, wherever it stands.

    A decay that is not decoupled acts where it stands: what follows sees it.

    Args:
        weight_decay: at least 0.
        decoupled: whether the parameter shrinks by itself, as AdamW's does.
    """

    weight_decay: float
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay)
        check_flag("decoupled", self.decoupled)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Adds, or notes it down."""
        if not self.decoupled:
            return [u + self.weight_decay * m.p for u, m in zip(us, run.members, strict=True)]
        for i in range(len(us)):
            run.shrink[i] += run.lr(i) * self.weight_decay
        return us


@dataclass(frozen=True)
class Momentum(Part):
    """m = momentum * m + (1 - dampening) * u (m = u at first); u = m, as torch.optim.SGD has it.

    Args:
        momentum: greater than 0.
        dampening: of u.
        nesterov: u = u + momentum * m instead; without dampening.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, strict=True)
        check_number("dampening", self.dampening, low=-math.inf)
        check_flag("nesterov", self.nesterov)
        if self.nesterov and self.dampening != 0:
            raise ValueError("nesterov needs dampening = 0")

    def state_keys(self) -> tuple[str, ...]:
        """The momentum."""
        return ("momentum_buffer",)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the momentum."""
        out = []
        for u, m, state in zip(us, run.members, run.states, strict=True):
            buffer = state["momentum_buffer"]
            buffer.copy_(u if m.first else self.momentum * buffer + (1 - self.dampening) * u)
            out.append(u + self.momentum * buffer if self.nesterov else buffer.clone())
        return out


@dataclass(frozen=True)
class Average(Part):
    """m = decay * m + (1 - decay) * u; u = m.

    Args:
        decay: in [0, 1).
        start: m before the first step: "zero", or "first": m = u in it.
    """

    decay: float = 0.9
    start: Start = "zero"

    def __post_init__(self) -> None:
        check_below_one("decay", self.decay)
        check_choice("start", self.start, ("zero", "first"))

    def state_keys(self) -> tuple[str, ...]:
        """The average."""
        return ("momentum_buffer",)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the average."""
        out = []
        for u, m, state in zip(us, run.members, run.states, strict=True):
            buffer = state["momentum_buffer"]
            at_once = m.first and self.start == "first"
            buffer.copy_(u if at_once else self.decay * buffer + (1 - self.decay) * u)
            out.append(buffer.clone())
        return out


@dataclass(frozen=True)
class ScaleByAdam(Part):
    """u = m / (sqrt(v) + eps), of averages of u and u^2 without bias: `pysmooth.Adam`.

    Args:
        betas: decay rates of the averages of u and u^2, in [0, 1).
        eps: added to the root, at least 0.
        amsgrad: v is the largest there was.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_number("eps", self.eps)
        check_flag("amsgrad", self.amsgrad)

    def state_keys(self) -> tuple[str, ...]:
        """Both moments; with amsgrad the largest second one."""
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def counts_steps(self) -> bool:
        """The bias depends on it."""
        return True

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the moments."""
        beta1, beta2 = self.betas
        out = []
        for u, m, state in zip(us, run.members, run.states, strict=True):
            first = state["exp_avg"].mul_(beta1).add_((1 - beta1) * u)
            second = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * u * u)
            if self.amsgrad:
                top = state["max_exp_avg_sq"]
                second = top.copy_(torch.maximum(top, second))
            n = m.step + 1
            root = (second / (1 - beta2**n)).sqrt() + self.eps
            out.append(first / (1 - beta1**n) / root)
        return out


@dataclass(frozen=True)
class ScaleByAdagrad(Part):
    """u = u / (sqrt(sum of u^2) + eps), and by 1 / (1 + step * lr_decay): `pysmooth.Adagrad`.

    Args:
        lr_decay: at least 0.
        initial_accumulator_value: where the sum starts.
        eps: added to the root, at least 0.
    """

    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            check_number(name, getattr(self, name))

    def state_keys(self) -> tuple[str, ...]:
        """The sum."""
        return ("sum",)

    def init(self) -> tuple[float | str, ...]:
        """As given."""
        return (self.initial_accumulator_value,)

    def counts_steps(self) -> bool:
        """For lr_decay."""
        return True

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Adds to the sum."""
        out = []
        for u, m, state in zip(us, run.members, run.states, strict=True):
            total = state["sum"].add_(u * u)
            out.append(u / (total.sqrt() + self.eps) / (1 + m.step * self.lr_decay))
        return out


@dataclass(frozen=True)
class ScaleByNorm(Part):
    r"""u = m / b, of an average m and an accumulated norm b: `pysmooth.MAdagradNorm`, `AdamNorm`.

    Without `beta2` b^2 = b^2 + reweight * \|\|u\|\|^2, else b^2 = beta2 * b^2 + (1 - beta2) *
    reweight * \|\|u\|\|^2.

    Args:
        b_init: b before the first step, greater than 0.
        beta1: decay rate of m, in [0, 1); 0: m = u.
        beta2: decay rate of b^2, in [0, 1); None: a sum.
        reweight: greater than 0.
        delayed: divide by the b of before the step.
        coordinate_wise: a b for each coordinate, u^2 in the place of the norm's square.
        eps: added to a coordinate's b.
        scope: of the norm: "global", "group" or "tensor".

    Source: arXiv:2406.04443.
    """

    b_init: float
    _: KW_ONLY
    beta1: float = 0.0
    beta2: float | None = None
    reweight: float = 1.0
    delayed: bool = False
    coordinate_wise: bool = False
    eps: float = 1e-8
    scope: ScopeName = "global"

    def __post_init__(self) -> None:
        for name in ("b_init", "reweight"):
            check_number(name, getattr(self, name), strict=True)
        check_below_one("beta1", self.beta1)
        if self.beta2 is not None:
            check_below_one("beta2", self.beta2)
        for name in ("delayed", "coordinate_wise"):
            check_flag(name, getattr(self, name))
        check_number("eps", self.eps)
        check_scope(self.scope)

    def _square(self) -> str:
        return "exp_avg_sq" if self.coordinate_wise else NORM_SQ

    def state_keys(self) -> tuple[str, ...]:
        """What is accumulated, and the average where there is one."""
        return (self._square(), *(("exp_avg",) if self.beta1 else ()))

    def init(self) -> tuple[float | str, ...]:
        """The accumulator's start."""
        return (self.b_init**2,)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves both."""
        keep = 1.0 if self.beta2 is None else self.beta2
        admit = self.reweight * (1.0 if self.beta2 is None else 1 - self.beta2)
        squares = [u * u for u in us]
        if not self.coordinate_wise:
            squares = [
                n.double().square() for n in norms([u.double() for u in us], run, self.scope)
            ]
            self._join(run)
        out = []
        for u, square, state in zip(us, squares, run.states, strict=True):
            b2 = state[self._square()]
            before = b2.clone()
            b2.copy_(keep * b2 + admit * square)
            if self.beta1:
                u = state["exp_avg"].mul_(self.beta1).add_((1 - self.beta1) * u)
            root = (before if self.delayed else b2).sqrt()
            out.append(u / (root + self.eps) if self.coordinate_wise else u / root.to(u.dtype))
        return out

    def _join(self, run: Run) -> None:
        """Those that are new start from where their group is."""
        if self.scope == "tensor":
            return
        held = {
            m.group: s[NORM_SQ] for m, s in zip(run.members, run.states, strict=True) if not m.first
        }
        for m, state in zip(run.members, run.states, strict=True):
            if m.first and m.group in held:
                state[NORM_SQ].copy_(held[m.group])


@dataclass(frozen=True)
class Sign(Part):
    """u = sign(u), 0 where it is 0.

    Args:
        scaled: times the mean magnitude of u in the tensor.
    """

    scaled: bool = False

    def __post_init__(self) -> None:
        check_flag("scaled", self.scaled)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Takes signs."""
        return [torch.sign(u) * (u.abs().mean() if self.scaled else 1.0) for u in us]


@dataclass(frozen=True)
class ScaleByLion(Part):
    """u = sign(beta1 * m + (1 - beta1) * u); m = beta2 * m + (1 - beta2) * u: `pysmooth.Lion`.

    Args:
        betas: weights of the interpolation and of the momentum, in [0, 1).
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def state_keys(self) -> tuple[str, ...]:
        """The momentum."""
        return ("exp_avg",)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Moves the momentum."""
        beta1, beta2 = self.betas
        out = []
        for u, state in zip(us, run.states, strict=True):
            m = state["exp_avg"]
            out.append(torch.sign(beta1 * m + (1 - beta1) * u))
            m.mul_(beta2).add_((1 - beta2) * u)
        return out


@dataclass(frozen=True)
class Normalize(Part):
    r"""u = u / (\|\|u\|\| + eps), 0 where u is 0.

    Args:
        eps: added to the norm, at least 0.
        scope: of the norm: "global", "group" or "tensor".
    """

    eps: float = 0.0
    _: KW_ONLY
    scope: ScopeName = "global"

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        check_scope(self.scope)

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Divides."""
        found = norms(us, run, self.scope)
        return [
            u * torch.where(norm == 0, 0.0, 1.0 / (norm + self.eps)).to(u.dtype)
            for u, norm in zip(us, found, strict=True)
        ]


@dataclass(frozen=True)
class Compress(Part):
    """u = C(u), of one of `pysmooth.compressors`, with or without feedback.

    Args:
        compressor: C.
        feedback: what becomes of the rest.

            - "none": u = C(u); what is lost is lost
            - "ef": v = e + lr * u; c = C(v); e = v - c; u = c / lr: `pysmooth.EFSGD`
            - "ef21": h = h + C(u - h); u = h: `pysmooth.EF21`
        start: for "ef21": h before the first step: "zero", or "first": h = u in it.
    """

    compressor: Compressor
    feedback: Literal["ef", "ef21", "none"] = "ef"
    start: Start = "zero"

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise TypeError(
                f"compressor must be one of pysmooth.compressors; got {self.compressor!r}"
            )
        check_choice("feedback", self.feedback, ("ef", "ef21", "none"))
        check_choice("start", self.start, ("zero", "first"))
        if self.start == "first" and self.feedback != "ef21":
            raise ValueError("start='first' goes with feedback='ef21' only")

    def state_keys(self) -> tuple[str, ...]:
        """The residual, or the estimate. For the scaled sign what makes up the residual."""
        if self.feedback == "ef21":
            return ("grad_estimate",)
        if self.feedback == "none":
            return ()
        sign = isinstance(self.compressor, ScaledSign)
        return ("compressor_input", SCALE) if sign else ("residual",)

    def counts_steps(self) -> bool:
        """Random numbers depend on it."""
        return True

    def remembers(self) -> bool:
        """What was lost."""
        return self.feedback != "none"

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Sends."""
        every = list(range(len(us)))
        if self.feedback == "none":
            return run.compress(self.compressor, every, us)
        if self.feedback == "ef21":
            return self._follow(us, run, every)
        run.in_steps = True
        vs = []
        for i in every:
            v = self._residual(run.states[i]) + run.lr(i) * us[i]
            vs.append(self._keep(run.states[i], v, torch.zeros_like(v)))
        sending = [i for i in every if run.lr(i) != 0]
        sent = [torch.zeros_like(u) for u in us]
        cs = run.compress(self.compressor, sending, [vs[i] for i in sending])
        for i, c in zip(sending, cs, strict=True):
            self._keep(run.states[i], vs[i], c)
            sent[i] = c
        return sent

    def _residual(self, state: dict[str, Tensor]) -> Tensor:
        if "residual" in state:
            return state["residual"]
        return state["compressor_input"] - scaled_sign(state["compressor_input"], state[SCALE])

    def _keep(self, state: dict[str, Tensor], v: Tensor, c: Tensor) -> Tensor:
        if "residual" in state:
            state["residual"].copy_(v - c)
        else:
            state["compressor_input"].copy_(v)
            state[SCALE].copy_(c.flatten()[0].abs())
        return v

    def _follow(self, us: list[Tensor], run: Run, every: list[int]) -> list[Tensor]:
        estimates = [state["grad_estimate"] for state in run.states]
        for h, u, m in zip(estimates, us, run.members, strict=True):
            if m.first and self.start == "first":
                h.copy_(u)
        ds = [u - h for u, h in zip(us, estimates, strict=True)]
        for h, c in zip(estimates, run.compress(self.compressor, every, ds), strict=True):
            h.add_(c)
        return [h.clone() for h in estimates]


@dataclass(frozen=True)
class ClipDifference(Part):
    r"""d = u - h; h = h + beta_hat * d * min(1, tau / \|\|d\|\|); u = h: `pysmooth.Clip21`.

    Args:
        tau: the threshold, greater than 0.
        beta_hat: step of the estimate, in (0, 1].
        scope: of the norm: "global", "group" or "tensor".
    """

    tau: float = 1.0
    beta_hat: float = 1.0
    _: KW_ONLY
    scope: ScopeName = "global"

    def __post_init__(self) -> None:
        check_number("tau", self.tau, strict=True)
        if check_number("beta_hat", self.beta_hat, strict=True) > 1:
            raise ValueError(f"beta_hat must be in (0, 1]; got {float(self.beta_hat)}")
        check_scope(self.scope)

    def state_keys(self) -> tuple[str, ...]:
        """The estimate."""
        return ("grad_estimate",)

    def remembers(self) -> bool:
        """The estimate."""
        return True

    def run(self, us: list[Tensor], run: Run) -> list[Tensor]:
        """Follows."""
        estimates = [state["grad_estimate"] for state in run.states]
        ds = [u - h for u, h in zip(us, estimates, strict=True)]
        for d, h, norm in zip(ds, estimates, norms(ds, run, self.scope), strict=True):
            h.add_(self.beta_hat * d * (self.tau / norm).clamp(max=1.0).to(d.dtype))
        return [h.clone() for h in estimates]
