"""Parts that send less than the update, and may remember the rest."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ...compressors import Compressor, ScaledSign
from ...engine.recipe import SCALE
from ...optim._base import check_scope
from ...optim._validate import check_choice, check_number
from ...reference.compress import scaled_sign
from ..base import Part, Run, ScopeName, Start, norms


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
        check_number("tau", self.tau, strict=True, infinite=True)
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
