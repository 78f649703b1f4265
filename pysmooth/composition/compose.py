"""Optimizers from chains of parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.recipe import ClipSpec, Recipe
from ..optim._base import FusedOptimizer
from ..optim._clip import Norm
from ..optim._precision import Precision
from ..optim._validate import check_choice, check_flag, check_number
from .base import Chain
from .table import fused

_POLICIES = ("propagate", "skip", "raise", "zero")


def compose(
    params: ParamsT,
    chain: Chain,
    lr: float | Tensor,
    *,
    maximize: bool = False,
    nonfinite: str | None = None,
    norm: Norm = "in_step",
    backend: Backend = "auto",
    **precision: Unpack[Precision],
) -> FusedOptimizer:
    """An optimizer put together from parts.

    Equivalent to::

        u = p.grad                          # -p.grad to maximize
        for part in chain.parts:
            u = part(u)                     # their formulas: pysmooth.parts
        p = p - lr * u

    Where a fused kernel computes exactly this chain, the result is the optimizer that is named for
    it (`type(optimizer)`), with its arguments in the groups and its states. Elsewhere there is no
    fall-back: pass `backend="eager"`, and the parts run one after another in plain torch, whatever
    their order. Both keep their states under the same names, so that checkpoints move between them
    and the named optimizers. docs/methods/composition.md has the list of what is fused.

    Args:
        params: parameters, named parameters, or groups of either; dtypes and layouts as in
            `pysmooth.ClipSGD`. Groups may differ in `lr` and `maximize`.
        chain: made by `pysmooth.chain`.
        lr: learning rate, at least 0.
        maximize: ascend instead of descend.
        nonfinite: "propagate", "skip" or "raise", as in `pysmooth.ClipSGD`; for chains that keep a
            residual or an estimate "skip", "raise" or "zero", as in `pysmooth.EFSGD`. None: the
            first of these.
        norm: "in_backward" takes the norm of a clip, and sees whether gradients are finite, in
            backward, as in `pysmooth.ClipSGD`; part by part both happen in the step.
        backend: "auto" or "cpu": fused; "eager": part by part.
        precision: `master_weights`, `kahan` or `stochastic_rounding`, as in `pysmooth.ClipSGD`.

    Raises:
        TypeError: `chain` is not one.
        ValueError: an argument is out of range.
        BackendError: no kernel computes this chain; says which part is in the way, and which fused
            chains are nearest.
    """
    if not isinstance(chain, Chain):
        raise TypeError(f"chain must be made by pysmooth.chain(...); got {chain!r}")
    policy = {} if nonfinite is None else {"nonfinite": nonfinite}
    shared: dict[str, Any] = {"maximize": maximize, "norm": norm, "backend": backend}
    shared |= {**policy, **precision}
    if backend == "eager":
        return ComposedOptimizer(params, chain, lr, **shared)
    make, kwargs = fused(chain)
    return make(params, lr=lr, **kwargs, **shared)


class ComposedOptimizer(FusedOptimizer):
    """Runs the parts of a chain one after another, in plain torch: `compose(backend="eager")`.

    `last_norm()` is None unless the policy asks for finite gradients first: norms belong to the
    parts.

    Args:
        params, chain, lr, maximize, nonfinite, norm, precision: as in `pysmooth.compose`.
        backend: "eager".

    Raises:
        ValueError: an argument is out of range.
    """

    chain: Chain

    def __init__(
        self,
        params: ParamsT,
        chain: Chain,
        lr: float | Tensor,
        *,
        maximize: bool = False,
        nonfinite: str | None = None,
        norm: Norm = "in_step",
        backend: Backend = "eager",
        **precision: Unpack[Precision],
    ) -> None:
        check_choice("backend", backend, ("eager",))
        check_choice("norm", norm, ("in_step", "in_backward"))
        self._take(chain)
        super().__init__(
            params,
            {"lr": lr, "maximize": maximize},
            scope="global",
            nonfinite=self.policies[0] if nonfinite is None else nonfinite,
            norm_type=2.0,
            backend=backend,
            **precision,
        )

    def _take(self, chain: Chain) -> None:
        self.chain = chain
        remembers = any(part.remembers() for part in chain.parts)
        self.policies = _POLICIES[1:] if remembers else _POLICIES[:3]

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        check_number("lr", group["lr"])
        check_flag("maximize", group["maximize"])

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The numbers of one group's step."""
        named = self.chain.keys()
        starts = [
            value
            for part, keys in zip(self.chain.parts, named, strict=True)
            for value in (*part.init(), *[0.0] * len(keys))[: len(keys)]
        ]
        return Recipe(
            "chain",
            (float(group["lr"]),),
            tuple(name for keys in named for name in keys.values()),
            ClipSpec(maximize=group["maximize"]),
            counts_steps=any(part.counts_steps() for part in self.chain.parts),
            init=tuple(starts),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chain": self.chain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_chain" in state:
            self._take(state.pop("_chain"))
        super().__setstate__(state)
