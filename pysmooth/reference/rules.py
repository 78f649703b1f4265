"""apply, in eager torch: one function per update rule, the twin of csrc/core/math."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import (
    accumulator,
    adagrad,
    adam,
    adgd,
    clip21,
    ef21,
    ef_sgd,
    normalized_sgd,
    scale,
    sgd,
    sign,
    stm,
)
from .staged import Member, Staged, run_chain
from .storage import compute_dtype

if TYPE_CHECKING:
    from ..engine.recipe import ClipSpec

Update = Callable[..., Tensor]


def gradient_in(
    grad: Tensor,
    dtype: torch.dtype,
    coef: Tensor | None,
    clip: ClipSpec,
    *,
    zero_nonfinite: bool = False,
) -> Tensor:
    """What becomes of a gradient before a rule sees it.

    Args:
        grad: as backward left it.
        dtype: what the rule computes in.
        coef: the clip coefficient; None: 1.
        clip: whether to clamp, and to ascend.
        zero_nonfinite: coordinates that are not finite count as 0.
    """
    g = grad.to(dtype)
    if zero_nonfinite:
        g = torch.where(g.isfinite(), g, 0.0)
    if coef is not None:
        g = g * coef.to(dtype)
    if clip.maximize:
        g = -g
    return g.clamp(-clip.value, clip.value) if clip.value >= 0 else g


@dataclass(frozen=True)
class EagerRule:
    """An update rule in plain torch, by name.

    Attributes:
        name: the same in every backend.
        hyper: names of its hyper-parameters.
        states: number of state tensors.
        update: the function of the new parameter; changes states in place. None for staged rules.
        counts_steps: whether it takes the number of the step, `step`, from 1.
        accumulates: whether it takes `norm_sq`, the accumulated squared norm before and after.
        takes_first: whether it takes `first`, true where the states hold nothing yet.
        staged: for rules that look at all parameters first, the function of all new ones.
        absorb: for rules that can take in gradients one by one before the step, what does that.
    """

    name: str
    hyper: tuple[str, ...]
    states: int
    update: Update | None
    counts_steps: bool = False
    accumulates: bool = False
    takes_first: bool = False
    staged: Staged | None = None
    absorb: Callable[[Member], None] | None = None

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        hyper: Sequence[float],
        *,
        coef: Tensor | None,
        clip: ClipSpec,
        first: bool,
        step: float,
        norm_sq: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Updates `param` and `states` in place, computing in float32, or float64 for float64."""
        assert self.update is not None
        p = param.to(compute_dtype(param))
        g = gradient_in(grad, p.dtype, coef, clip)
        named: dict[str, Any] = dict(zip(self.hyper, hyper, strict=True))
        if self.counts_steps:
            named["step"] = step
        if self.accumulates:
            named["norm_sq"] = norm_sq
        if self.takes_first:
            named["first"] = first
        new = self.update(p, g, states, **named)
        param.copy_(new)


def _staged(
    name: str, module: Any, states: int, *, counts_steps: bool = False, staged: Staged | None = None
) -> EagerRule:
    step = module.step if staged is None else staged
    absorb = getattr(module, "absorb", None) if states == 1 else None
    return EagerRule(
        name, module.HYPER, states, None, counts_steps=counts_steps, staged=step, absorb=absorb
    )


def _ef_sgd() -> list[EagerRule]:
    signs = [
        EagerRule(
            f"ef_sgd_sign{suffix}",
            ef_sgd.SIGN_HYPER,
            states,
            None,
            counts_steps=True,
            staged=ef_sgd.sign_step,
            absorb=None if suffix else ef_sgd.absorb_sign,
        )
        for states, suffix in ((1, ""), (2, "_momentum"))
    ]
    return signs + [
        _staged(f"ef_sgd_{form}{suffix}", ef_sgd, states, counts_steps=True)
        for form in ("dense", "select")
        for states, suffix in ((1, ""), (2, "_momentum"))
    ]


def _ef21() -> list[EagerRule]:
    return [
        _staged(f"ef21_{form}{suffix}", ef21, states, counts_steps=True, staged=staged)
        for form, staged in (
            ("dense", ef21.dense),
            ("select", ef21.select),
            ("select_normalized", ef21.select),
        )
        for states, suffix in ((1, ""), (2, "_m"), (3, "_2m"))
    ] + [
        _staged(f"ef21_plus{suffix}", ef21, states, counts_steps=True, staged=ef21.plus)
        for states, suffix in ((1, ""), (2, "_m"))
    ]


RULES: dict[str, EagerRule] = {
    rule.name: rule
    for rule in (
        EagerRule("scale", ("coef",), 0, scale.update),
        EagerRule("sgd", sgd.HYPER, 0, sgd.update, takes_first=True),
        EagerRule("sgd_momentum", sgd.HYPER, 1, sgd.update, takes_first=True),
        EagerRule("adagrad", adagrad.HYPER, 1, adagrad.update, counts_steps=True),
        EagerRule("adam", adam.HYPER, 2, adam.update, counts_steps=True),
        EagerRule("adam_amsgrad", adam.HYPER, 3, adam.update, counts_steps=True),
        EagerRule("sign_sgd", sign.HYPER, 0, sign.update),
        EagerRule("signum", sign.HYPER, 1, sign.update),
        _staged("scaled_sign_sgd", sign, 0, staged=sign.scaled_step),
        _staged("scaled_signum", sign, 1, staged=sign.scaled_step),
        EagerRule("lion", sign.LION_HYPER, 1, sign.lion),
        *(
            EagerRule(
                f"norm_accumulator{suffix}",
                accumulator.NORM_HYPER,
                states,
                accumulator.norm_update,
                accumulates=True,
            )
            for states, suffix in ((0, ""), (1, "_momentum"))
        ),
        *(
            EagerRule(f"accumulator{suffix}", accumulator.HYPER, states, accumulator.update)
            for states, suffix in ((1, ""), (2, "_momentum"))
        ),
        EagerRule("stm", stm.HYPER, 2, stm.update, takes_first=True),
        _staged("adgd", adgd, 1),
        _staged("normalized_sgd", normalized_sgd, 1),
        _staged("clip21", clip21, 1),
        _staged("clip21_noise", clip21, 2, counts_steps=True, staged=clip21.noisy),
        _staged("clip21_sgd2m", clip21, 2),
        _staged("clip21_sgd2m_noise", clip21, 3, counts_steps=True, staged=clip21.noisy),
        *_ef_sgd(),
        *_ef21(),
    )
}

# The rule of optimizers that run the parts of a chain one after another: backend "eager" only.
EAGER_RULES: dict[str, EagerRule] = {
    "chain": EagerRule("chain", ("lr",), 0, None, staged=run_chain)
}
