"""The methods under test. Adding one to the suite is one entry here.

A method names its passes over memory: each is (streams read and written, streams only read), in
values per parameter. Their sum is the stream budget that the roofline is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip

import pysmooth
from pysmooth.engine.backends import fastest
from pysmooth.optim._base import FusedOptimizer

from . import packages, rivals, written
from .problem import Problem, Step, keeping
from .written import Written

Pass = tuple[int, int]


@dataclass(frozen=True)
class Method:
    """One method: how pysmooth does it, how the rivals do it, what it must move."""

    name: str
    passes: tuple[Pass, ...]
    ours: Callable[[Problem], tuple[Step, str]]  # the step, and the backend that runs it
    rivals: dict[str, Callable[[Problem], Step]]
    momentum: float = 0.0
    clips: bool = False  # whether the norm exceeds max_norm
    compiled: Callable[[Problem], tuple[Step, float]] | None = None  # with seconds to compile
    states: float = 0  # in float32 values per parameter
    models: tuple[str, ...] | None = None  # in a default run; None: all
    dtype: str | None = None  # of DTYPES, if it is for one only
    draws: bool = False  # random numbers, each contestant its own: results cannot be compared
    rounds_states: bool = False  # keeps something in 16 bits: one step has no float64 twin

    @property
    def streams(self) -> int:
        """Reads and writes of one value per parameter."""
        return sum(2 * rw + r for rw, r in self.passes)


def _optimizer(
    make: Callable[[Problem], FusedOptimizer],
) -> Callable[[Problem], tuple[Step, str]]:
    def ours(problem: Problem) -> tuple[Step, str]:
        optimizer = make(problem)
        optimizer.use_backend(problem.backend)
        return optimizer.step, optimizer.resolved_backend

    return ours


def _clip(problem: Problem) -> tuple[Step, str]:
    backend = fastest(problem.params)  # of any function: there is no choice
    return lambda: pysmooth.clip_grad_norm_(problem.params, problem.max_norm), backend


def _torch_clip(foreach: bool) -> Callable[[Problem], Step]:
    return lambda problem: lambda: torch_clip(problem.params, problem.max_norm, foreach=foreach)


_CLIP_RIVALS: dict[str, Callable[[Problem], Step]] = {
    "torch for-loop": _torch_clip(False),
    "torch foreach": _torch_clip(True),
}


def _adamw_bf16(**kwargs: Any) -> Callable[[Problem], tuple[Step, str]]:
    return _optimizer(
        lambda p: pysmooth.AdamW(p.params, p.lr, weight_decay=0.01, max_norm=p.max_norm, **kwargs)
    )


_clip_sgd = _optimizer(
    lambda p: pysmooth.ClipSGD(p.params, p.lr, momentum=p.momentum, max_norm=p.max_norm)
)


def _polyak(problem: Problem) -> tuple[Step, str]:
    optimizer = pysmooth.PolyakSGD(problem.params, lr=problem.lr)
    optimizer.use_backend(problem.backend)
    return keeping(lambda: optimizer.step(loss=1.0), optimizer), optimizer.resolved_backend


def _adgd(problem: Problem) -> tuple[Step, str]:
    optimizer = pysmooth.AdGD(problem.params, problem.lr)
    optimizer.use_backend(problem.backend)

    def step() -> None:
        optimizer.step()
        optimizer.param_groups[0]["ratio"] = 0.0  # see written.adgd

    return keeping(step, optimizer), optimizer.resolved_backend


def _by_hand(
    step: written.Function, loop: written.Function, states: int = 0, **kwargs: Any
) -> dict[str, Any]:
    """A method that torch does not have: as one writes it down, with foreach ops, and compiled."""
    foreach = Written(step, states, **kwargs)
    plain = {rivals.EAGER: Written(loop, states, **kwargs).eager, "torch foreach": foreach.eager}
    return {"rivals": plain, "compiled": foreach.compiled, "states": states, "models": ()}


METHODS = {
    m.name: m
    for m in (
        Method("clip_grad_norm (nothing clipped)", ((0, 1),), _clip, _CLIP_RIVALS),
        Method("clip_grad_norm (clipped)", ((0, 1), (1, 0)), _clip, _CLIP_RIVALS, clips=True),
        Method(
            "clip_sgd",
            ((0, 1), (1, 1)),
            _clip_sgd,
            {**rivals.RIVALS, **packages.sgd(0.0)},
            compiled=rivals.compiled,
            clips=True,
        ),
        Method(
            "clip_sgd_momentum",
            ((0, 1), (2, 1)),
            _clip_sgd,
            {**rivals.RIVALS, **packages.sgd(0.9)},
            momentum=0.9,
            compiled=rivals.compiled,
            clips=True,
            states=1,
        ),
        Method(
            "agc_sgd_momentum",
            ((0, 2), (2, 1)),
            _optimizer(lambda p: pysmooth.ClipSGD(p.params, p.lr, momentum=0.9, clip="agc")),
            {rivals.EAGER: Written(written.agc_momentum, 1).eager},
            compiled=Written(written.agc_momentum_whole, 1).compiled,
            clips=True,
            states=1,
            models=(),
        ),
        Method(
            "clip_adagrad",
            ((0, 1), (2, 1)),
            _optimizer(lambda p: pysmooth.Adagrad(p.params, p.lr, eps=1e-10, max_norm=p.max_norm)),
            {
                "torch for-loop": rivals.torch_adagrad(foreach=False, fused=False),
                "torch foreach": rivals.torch_adagrad(foreach=True),
                "torch fused": rivals.torch_adagrad(fused=True),
                **packages.adagrad(),
            },
            compiled=Written(written.adagrad, 1).compiled,
            clips=True,
            states=1,
            models=("gpt2-124m",),
        ),
        Method(
            "clip_adamw",
            ((0, 1), (3, 1)),
            _optimizer(
                lambda p: pysmooth.AdamW(p.params, p.lr, weight_decay=0.01, max_norm=p.max_norm)
            ),
            {
                "torch for-loop": rivals.torch_adamw(foreach=False, fused=False),
                "torch foreach": rivals.torch_adamw(foreach=True),
                "torch fused": rivals.torch_adamw(fused=True),
                **packages.adamw(),
            },
            compiled=Written(written.adamw, 2, counts=1).compiled,
            clips=True,
            states=2,
            models=("gpt2-124m",),
        ),
        # States in bfloat16, against rivals with float32 ones: two of them are one stream.
        Method(
            "clip_adamw-bf16-states",
            ((0, 1), (2, 1)),
            _optimizer(
                lambda p: pysmooth.AdamW(
                    p.params,
                    p.lr,
                    weight_decay=0.01,
                    max_norm=p.max_norm,
                    state_dtype=torch.bfloat16,
                )
            ),
            {"torch fused": rivals.torch_adamw(fused=True)},
            compiled=Written(written.adamw, 2, counts=1).compiled,
            clips=True,
            states=1,
            models=(),
            rounds_states=True,
        ),
        # Of bfloat16 parameters. What torch fuses for these keeps bfloat16 states, and stalls. Two
        # values of 16 bits are one stream, and what is left over is another.
        *(
            Method(
                f"clip_adamw-bf16-params-{name}",
                ((0, 1), apply),
                _adamw_bf16(**kwargs),
                {
                    "torch fused": rivals.torch_adamw(fused=True),
                    rivals.MASTERS: rivals.torch_adamw_masters,
                },
                clips=True,
                states=states,
                models=(),
                dtype="bf16",
                rounds_states=True,
            )
            for name, apply, states, kwargs in (
                ("master", (3, 1), 3.0, {"master_weights": True}),
                ("kahan", (3, 1), 2.5, {"kahan": True}),
                ("stochastic", (2, 2), 2.0, {"stochastic_rounding": True}),
                ("all", (1, 2), 1.0, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}),
            )
        ),
        Method(
            "clip_adam_norm",
            ((0, 1), (2, 1)),
            _optimizer(
                lambda p: pysmooth.AdamNorm(p.params, p.lr, b_init=1.0, max_norm=p.max_norm)
            ),
            {rivals.EAGER: Written(written.adam_norm, 2).eager},
            compiled=Written(written.adam_norm, 2).compiled,
            clips=True,
            states=1,
            models=(),
        ),
        Method(
            "signum",
            ((2, 1),),
            _optimizer(lambda p: pysmooth.Signum(p.params, p.lr)),
            {
                rivals.EAGER: Written(written.signum_loop, 1).eager,
                "torch foreach": Written(written.signum, 1).eager,
                **packages.signum(),
            },
            compiled=Written(written.signum, 1).compiled,
            states=1,
            models=("gpt2-124m",),
        ),
        Method(
            "lion",
            ((2, 1),),
            _optimizer(lambda p: pysmooth.Lion(p.params, p.lr, weight_decay=0.01)),
            {
                rivals.EAGER: Written(written.lion_loop, 1).eager,
                "torch foreach": Written(written.lion, 1).eager,
                **packages.lion(),
            },
            compiled=Written(written.lion, 1).compiled,
            states=1,
            models=(),
        ),
        Method(
            "normalized_sgd",
            ((1, 1), (1, 1)),
            _optimizer(lambda p: pysmooth.NormalizedSGD(p.params, p.lr)),
            {rivals.EAGER: Written(written.normalized, 1, counts=1).eager},
            compiled=Written(written.normalized, 1, counts=1).compiled,
            states=1,
            models=(),
        ),
        # Step sizes of the theory.
        Method(
            "l0l1_gd",
            ((0, 1), (1, 1)),
            _optimizer(lambda p: pysmooth.L0L1GD(p.params, 1.0, 1.0, p.lr)),
            **_by_hand(written.l0l1, written.l0l1_loop),
        ),
        Method(
            "polyak_sgd",
            ((0, 1), (1, 1)),
            _polyak,
            **_by_hand(written.polyak, written.polyak_loop),
        ),
        Method(
            "adgd",  # the gradient before is written, and not read, in the last pass
            ((0, 1), (0, 2), (1, 2)),
            _adgd,
            **_by_hand(written.adgd, written.adgd_loop, 1, counts=2),
        ),
        Method(
            "stm",
            ((0, 1), (3, 1)),
            _optimizer(lambda p: pysmooth.STM(p.params, 1 / p.lr, 1.0, 0.28)),
            **_by_hand(written.stm, written.stm_loop, 2, counts=3, starts=True),
        ),
        # The rivals of what follows do not look for non-finite numbers: "zero" is the policy that
        # costs no pass of its own.
        Method(
            "ef_sgd-scaled-sign",
            ((1, 1), (1, 0)),  # and a bit, which counts as nothing
            _optimizer(
                lambda p: pysmooth.EFSGD(p.params, p.lr, pysmooth.ScaledSign(), nonfinite="zero")
            ),
            {rivals.EAGER: Written(written.ef_sign, 1).eager},
            compiled=Written(written.ef_sign, 1).compiled,
            states=1,
            models=(),
        ),
        Method(
            "ef_sgd-top-k",
            ((1, 1),),
            _optimizer(
                lambda p: pysmooth.EFSGD(
                    p.params, p.lr, pysmooth.TopK(ratio=written.RATIO), nonfinite="zero"
                )
            ),
            {
                rivals.EAGER: Written(written.ef_top_k, 1).eager,
                rivals.IN_PLACE: Written(written.ef_top_k_in_place, 1).eager,
            },
            states=1,
            models=(),
        ),
        Method(
            "ef21-top-k",
            ((1, 2),),
            _optimizer(
                lambda p: pysmooth.EF21(
                    p.params, p.lr, pysmooth.TopK(ratio=written.RATIO), nonfinite="zero"
                )
            ),
            {rivals.EAGER: Written(written.ef21_top_k, 1).eager},
            states=1,
            models=(),
        ),
        Method(
            "ef_sgd-qsgd",
            ((1, 1), (2, 0)),
            _optimizer(
                lambda p: pysmooth.EFSGD(
                    p.params, p.lr, pysmooth.QSGD(written.LEVELS), nonfinite="zero"
                )
            ),
            {rivals.EAGER: Written(written.ef_qsgd, 1).eager},
            compiled=Written(written.ef_qsgd, 1).compiled,
            states=1,
            draws=True,
            models=(),
        ),
        Method(
            "ef_sgd-natural",
            ((1, 1), (2, 0)),
            _optimizer(
                lambda p: pysmooth.EFSGD(
                    p.params, p.lr, pysmooth.NaturalCompression(), nonfinite="zero"
                )
            ),
            {rivals.EAGER: Written(written.ef_natural, 1).eager},
            compiled=Written(written.ef_natural, 1).compiled,
            states=1,
            draws=True,
            models=(),
        ),
        Method(
            "ef21_plus-top-k",  # and marks, which count as nothing
            ((0, 2), (0, 1), (0, 2), (0, 1), (1, 1), (1, 1)),
            _optimizer(
                lambda p: pysmooth.EF21Plus(
                    p.params, p.lr, pysmooth.TopK(ratio=written.RATIO), nonfinite="zero"
                )
            ),
            {rivals.EAGER: Written(written.ef21_plus_top_k, 1).eager},
            states=1,
            models=(),
        ),
        Method(
            "clip21_sgd2m-noise",
            ((1, 2), (3, 1)),
            _optimizer(
                lambda p: pysmooth.Clip21SGD2M(
                    p.params, p.lr, p.max_norm, noise_std=1.0, nonfinite="zero"
                )
            ),
            {rivals.EAGER: Written(written.clip21_sgd2m_noise, 3).eager},
            compiled=Written(written.clip21_sgd2m_noise, 3).compiled,
            clips=True,
            states=3,
            draws=True,
            models=(),
        ),
        Method(
            "clip21_sgd2m",
            ((1, 2), (2, 1)),
            _optimizer(
                lambda p: pysmooth.Clip21SGD2M(p.params, p.lr, p.max_norm, nonfinite="zero")
            ),
            {rivals.EAGER: Written(written.clip21_sgd2m, 2).eager},
            compiled=Written(written.clip21_sgd2m, 2).compiled,
            clips=True,
            states=2,
            models=(),
        ),
    )
}

DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32-bf16grad": (torch.float32, torch.bfloat16),
}


def make_problem(
    shapes: list[tuple[int, ...]], method: Method, dtype: str, device: str, seed: int = 0
) -> Problem:
    """Parameters with random gradients, whose norm is twice max_norm if the method clips."""
    param_dtype, grad_dtype = DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(seed)
    params: list[Tensor] = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        p = torch.nn.Parameter((0.02 * value).to(param_dtype))
        if grad_dtype != param_dtype:
            p.grad_dtype = grad_dtype
        p.grad = value.to(grad_dtype)
        params.append(p)
    norm = float(pysmooth.get_total_norm([p.grad for p in params if p.grad is not None]))
    if not method.clips:
        return Problem(params, 1e-9, method.momentum, 1e9 * norm)
    recorded = [p.grad.clone() for p in params if p.grad is not None]
    return Problem(params, 1e-9, method.momentum, 0.5 * norm, recorded)
