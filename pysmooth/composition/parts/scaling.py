"""Parts that divide by an accumulator."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ...engine.recipe import NORM_SQ
from ...optim._base import check_scope
from ...optim._validate import check_below_one, check_flag, check_number
from ...optim.adam import check_betas
from ..base import Part, Run, ScopeName, norms


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
