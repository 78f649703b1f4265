"""The registry of optimizers that tests/test_battery_*.py examine.

A new optimizer joins with one `Entry` in `REGISTRY`: every check then runs on it, on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import pysmooth
from pysmooth.compressors import (
    QSGD,
    HardThreshold,
    Identity,
    NaturalCompression,
    RandK,
    ScaledSign,
    TopK,
)

Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Attributes:
        name: the test id.
        make: the class, called as make(params, backend=..., **kwargs).
        variants: named sets of keyword arguments. "main" is the richest: stateful and clipping.
        state_keys: keys of its state tensors, given those arguments.
        twin: the torch class that it equals with `twin_kwargs`, or None.
        twin_kwargs: arguments that both classes take.
        dtypes: parameter dtypes.
        clips: whether it clips the gradient, and so knows `max_norm` and the policy "propagate".
        tensors: arguments that make every tensor, or every group, a step of its own.
        joint: whether one number, made of all clipped gradients, enters every parameter's step.
        waits: whether the host chooses a number of the step, and so waits for a device.
        ulp: bound of the error of one step against the float64 oracle, in `units`.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    variants: Mapping[str, Kwargs]
    state_keys: Callable[[Kwargs], tuple[str, ...]]
    twin: Callable[..., torch.optim.Optimizer] | None = None
    twin_kwargs: Kwargs = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
    )
    clips: bool = True
    tensors: Kwargs = field(default_factory=lambda: {"scope": "tensor"})
    joint: bool = False
    waits: bool = False
    ulp: float = 2.0

    @property
    def main(self) -> Kwargs:
        return self.variants["main"]

    def build(self, params: Any, backend: str, **overrides: Any) -> torch.optim.Optimizer:
        """An optimizer of the "main" variant."""
        return self.make(params, backend=backend, **{**self.main, **overrides})

    def apart(self, params: Sequence[Any]) -> list[Any]:
        """The parameters such that, given `tensors`, each is a step of its own."""
        if self.tensors.get("scope") == "group":
            return [{"params": [p]} for p in params]
        return list(params)


class GivenLoss(pysmooth.PolyakSGD):
    """The loss is 1, whatever the closure says: gradients here are drawn, and those of nothing."""

    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        """One step."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        signs = [-1.0 if group["maximize"] else 1.0 for group in self.param_groups]
        super().step(loss=signs[: len(self.units())])
        return loss


# Of TheoryClipSGD: the threshold lies among the norms of what `record_grads` draws.
THEORY: Kwargs = {
    "L0": 0.1,
    "L1": 0.3,
    "sigma": 0.1,
    "R0": 1.0,
    "T": 100,
    "double_sampling": False,
}


def _momentum_buffer(kwargs: Kwargs) -> tuple[str, ...]:
    return ("momentum_buffer",) if kwargs.get("momentum", 0) else ()


def _moments(kwargs: Kwargs) -> tuple[str, ...]:
    amsgrad = ("max_exp_avg_sq",) if kwargs.get("amsgrad") else ()
    return ("exp_avg", "exp_avg_sq", *amsgrad)


REGISTRY: tuple[Entry, ...] = (
    Entry(
        "clip_sgd",
        pysmooth.ClipSGD,
        {
            "main": {"lr": 0.1, "max_norm": 1.0, "momentum": 0.9, "weight_decay": 0.01},
            "plain": {"lr": 0.1},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "max_norm": 5.0},
            "dampening": {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "clip": "none"},
            "smooth": {"lr": 0.1, "max_norm": 2.0, "clip": "smooth", "scope": "tensor"},
            "normalize": {"lr": 0.1, "clip": "normalize", "scope": "group", "momentum": 0.9},
            "value": {"lr": 0.1, "clip": "value", "max_norm": 0.5, "maximize": True},
            "agc": {"lr": 0.1, "clip": "agc", "momentum": 0.9, "maximize": True},
            "decoupled": {
                "lr": 0.1,
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
                "momentum": 0.9,
                "norm_type": float("inf"),
                "max_norm": 0.5,
            },
        },
        _momentum_buffer,
        twin=torch.optim.SGD,
        twin_kwargs={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ),
    Entry(
        "l0l1_gd",
        pysmooth.L0L1GD,
        {
            "main": {"L0": 2.0, "L1": 0.5, "eta": 0.5, "momentum": 0.9, "weight_decay": 0.01},
            "normalised": {"L0": 0.0, "L1": 1.0, "eta": 0.1, "scope": "tensor"},
        },
        _momentum_buffer,
    ),
    Entry(
        "polyak_sgd",
        GivenLoss,
        {
            "main": {"c": 0.5, "max_step": 3.0, "lr": 0.7, "scope": "group"},
            "smoothed": {"growth": 2.0, "first_step": 0.01, "eps": 1e-8},
        },
        lambda _: (),
        tensors={"scope": "group"},
        waits=True,
        ulp=4.0,
    ),
    Entry(
        "adgd",
        pysmooth.AdGD,
        {"main": {"lr": 0.01}, "quarter": {"lr": 0.01, "gamma": 0.25, "scope": "group"}},
        lambda _: ("prev_grad",),
        tensors={"scope": "group"},
        joint=True,
        waits=True,
        ulp=4.0,
    ),
    Entry(
        "stm",
        pysmooth.STM,
        {
            "main": {"L0": 2.0, "L1": 0.5},
            "plain": {"L0": 0.0, "L1": 1.0, "eta": 0.1, "variant": "plain", "scope": "group"},
        },
        lambda _: ("solution", "dual"),
        tensors={"scope": "group"},
        waits=True,
        ulp=4.0,
    ),
    Entry(
        "theory_clip_sgd",
        pysmooth.TheoryClipSGD,
        {
            "main": {**THEORY, "average": True},
            "adaptive": {**THEORY, "rule": "adaptive", "scope": "group"},
            "implicit": {**THEORY, "rule": "implicit", "lr": 2.0},
        },
        lambda kwargs: ("average",) if kwargs.get("average") else (),
        tensors={"scope": "group"},
        waits=True,
        ulp=4.0,
    ),
    Entry(
        "adagrad",
        pysmooth.Adagrad,
        {
            # Little weight decay: where it cancels the gradient, what is left is all rounding, and
            # the division by the root brings it to full size.
            "main": {"lr": 0.1, "max_norm": 1.0, "weight_decay": 1e-4, "lr_decay": 0.1},
            "plain": {"lr": 0.1},
            "initial": {"lr": 0.1, "initial_accumulator_value": 0.1, "clip": "none"},
            "smooth": {"lr": 0.1, "max_norm": 2.0, "clip": "smooth", "scope": "tensor"},
            "value": {"lr": 0.1, "clip": "value", "max_norm": 0.5, "maximize": True},
        },
        lambda _: ("sum",),
        twin=torch.optim.Adagrad,
        twin_kwargs={"lr": 0.1, "weight_decay": 0.01, "lr_decay": 0.1},
        ulp=4.0,
    ),
    Entry(
        "adam",
        pysmooth.Adam,
        {
            "main": {"lr": 0.01, "max_norm": 1.0, "weight_decay": 1e-4},
            "plain": {"lr": 0.01},
            "amsgrad": {"lr": 0.01, "amsgrad": True, "max_norm": 5.0, "scope": "group"},
            "betas": {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "clip": "normalize"},
        },
        _moments,
        twin=torch.optim.Adam,
        twin_kwargs={"lr": 0.01, "weight_decay": 0.01},
        ulp=4.0,
    ),
    Entry(
        "adamw",
        pysmooth.AdamW,
        {
            "main": {"lr": 0.01, "max_norm": 1.0, "weight_decay": 0.1},
            "amsgrad": {"lr": 0.01, "amsgrad": True, "clip": "value", "max_norm": 0.5},
            "skip": {"lr": 0.01, "nonfinite": "skip", "norm_type": 1.0, "max_norm": 50.0},
            "agc": {"lr": 0.01, "clip": "agc", "agc_factor": 0.1, "agc_eps": 0.5},
            "in_backward": {"lr": 0.01, "max_norm": 1.0, "norm": "in_backward"},
        },
        _moments,
        twin=torch.optim.AdamW,
        twin_kwargs={"lr": 0.01, "weight_decay": 0.1},
        ulp=4.0,
    ),
    Entry(
        "sign_sgd",
        pysmooth.SignSGD,
        {
            "main": {"lr": 0.01, "momentum": 0.9, "max_norm": 1.0, "weight_decay": 0.1},
            "plain": {"lr": 0.01},
            "value": {"lr": 0.01, "clip": "value", "max_norm": 0.5, "momentum": 0.5},
            "scaled": {"lr": 0.1, "scaled": True, "max_norm": 1.0},
            "scaled_momentum": {"lr": 0.1, "scaled": True, "momentum": 0.5, "scope": "tensor"},
        },
        _momentum_buffer,
    ),
    Entry(
        "lion",
        pysmooth.Lion,
        {
            "main": {"lr": 0.01, "max_norm": 1.0, "weight_decay": 0.1},
            "plain": {"lr": 0.01, "betas": (0.95, 0.98)},
        },
        lambda _: ("exp_avg",),
    ),
    Entry(
        "normalized_sgd",
        pysmooth.NormalizedSGD,
        {
            "main": {"lr": 0.1, "max_norm": 1.0, "weight_decay": 0.1},
            "plain": {"lr": 0.1, "momentum": 0.0},
            "tensor": {"lr": 0.1, "scope": "tensor", "eps": 1e-3, "momentum": 0.5},
            "group": {"lr": 0.1, "scope": "group", "clip": "value", "max_norm": 0.5},
            "agc": {"lr": 0.1, "clip": "agc"},
        },
        lambda _: ("momentum_buffer",),
        joint=True,
        ulp=4.0,
    ),
    Entry(
        "adagrad_norm",
        pysmooth.AdagradNorm,
        {
            "main": {"lr": 0.1, "b_init": 0.5, "max_norm": 1.0, "weight_decay": 0.1},
            "delayed": {"lr": 0.1, "b_init": 0.5, "delayed": True, "scope": "tensor"},
            "agc": {"lr": 0.1, "b_init": 0.01, "clip": "agc"},
            "coordinates": {"lr": 0.1, "b_init": 0.1, "coordinate_wise": True, "reweight": 0.5},
        },
        lambda kwargs: ("exp_avg_sq",) if kwargs.get("coordinate_wise") else (),
        joint=True,
        ulp=4.0,
    ),
    Entry(
        "clip_radagradd",
        pysmooth.ClipRAdaGradD,
        {"main": {"lr": 0.1, "b_init": 0.5, "max_norm": 1.0, "reweight": 0.3}},
        lambda _: (),
        ulp=4.0,
    ),
    Entry(
        "m_adagrad_norm",
        pysmooth.MAdagradNorm,
        {
            "main": {"lr": 0.1, "b_init": 0.5, "max_norm": 1.0, "weight_decay": 0.1},
            "group": {"lr": 0.1, "b_init": 2.0, "scope": "group", "maximize": True},
        },
        lambda _: ("exp_avg",),
        joint=True,
        ulp=4.0,
    ),
    Entry(
        "adam_norm",
        pysmooth.AdamNorm,
        {
            "main": {"lr": 0.1, "b_init": 0.5, "max_norm": 1.0, "weight_decay": 0.1},
            "plain": {"lr": 0.1, "b_init": 0.5, "betas": (0.0, 0.9), "clip": "smooth"},
        },
        lambda kwargs: ("exp_avg",) if kwargs.get("betas", (0.9,))[0] else (),
        joint=True,
        ulp=4.0,
    ),
    Entry(
        "adamd_norm",
        pysmooth.AdamDNorm,
        {
            "main": {"lr": 0.1, "b_init": 0.5, "max_norm": 1.0, "weight_decay": 0.1},
            "coordinates": {
                "lr": 0.1,
                "b_init": 0.5,
                "coordinate_wise": True,
                "clip": "value",
                "max_norm": 0.5,
            },
        },
        lambda kwargs: ("exp_avg_sq", "exp_avg") if kwargs.get("coordinate_wise") else ("exp_avg",),
        ulp=4.0,
    ),
    Entry(
        "clip21",
        pysmooth.Clip21,
        {
            "main": {"lr": 0.1, "tau": 2.0, "weight_decay": 0.1},
            "tensor": {"scope": "tensor"},
            "noise": {"lr": 0.1, "tau": 2.0, "weight_decay": 0.1, "noise_std": 0.3, "seed": 5},
        },
        lambda kwargs: (
            "grad_estimate",
            *(("server_estimate",) if kwargs.get("noise_std") else ()),
        ),
        ulp=4.0,
        clips=False,
    ),
    Entry(
        "clip21_sgd2m",
        pysmooth.Clip21SGD2M,
        {
            "main": {"lr": 0.1, "tau": 2.0, "beta_hat": 0.5, "weight_decay": 0.1},
            "zero": {"lr": 0.1, "tau": 0.5, "scope": "group", "nonfinite": "zero"},
            "noise": {"lr": 0.1, "tau": 2.0, "beta_hat": 0.5, "noise_std": 0.3, "seed": 5},
        },
        lambda kwargs: (
            "grad_estimate",
            "momentum_buffer",
            *(("server_estimate",) if kwargs.get("noise_std") else ()),
        ),
        ulp=4.0,
        clips=False,
    ),
    Entry(
        "ef_sgd",
        pysmooth.EFSGD,
        {
            # Not top-k: among values that depend on a rounded parameter, or are sums of few-bit
            # numbers that happen to be equal, the oracle would choose others.
            "main": {"lr": 0.1, "compressor": HardThreshold(0.0123), "momentum": 0.9},
            "top_k": {
                "lr": 0.1,
                "compressor": TopK(ratio=0.05),
                "momentum": 0.9,
                "weight_decay": 0.01,
            },
            "top_k_global": {"lr": 0.1, "compressor": TopK(k=40, scope="global")},
            "top_k_block": {"lr": 0.1, "compressor": TopK(ratio=0.1, scope="block", block_size=64)},
            "rand_k": {"lr": 0.1, "compressor": RandK(ratio=0.1, scaled=False, seed=3)},
            # Seeds for which no draw falls between a rounded value and the oracle's.
            "natural": {"lr": 0.1, "compressor": NaturalCompression(seed=1), "momentum": 0.5},
            "qsgd": {"lr": 0.1, "compressor": QSGD(256, seed=1), "nonfinite": "zero"},
            "qsgd_block": {
                "lr": 0.1,
                "compressor": QSGD(16, scope="block", block_size=64, seed=1),
            },
            "sign": {"lr": 0.1, "compressor": ScaledSign(), "maximize": True},
            "clip_top_k": {
                "lr": 0.1,
                "compressor": TopK(ratio=0.05),
                "max_norm": 1.0,
                "weight_decay": 0.01,
            },
            "clip_sign": {
                "lr": 0.1,
                "compressor": ScaledSign(),
                "max_norm": 1.0,
                "scope": "tensor",
                "momentum": 0.5,
                "norm": "in_backward",
            },
            "clip_value": {
                "lr": 0.1,
                "compressor": HardThreshold(0.0123),
                "clip": "value",
                "max_norm": 0.5,
                "nonfinite": "zero",
            },
            "agc": {"lr": 0.1, "compressor": HardThreshold(0.0123), "clip": "agc"},
            "absorb": {"lr": 0.1, "compressor": TopK(k=40, scope="global"), "absorb": True},
            "absorb_sign": {"lr": 0.1, "compressor": ScaledSign(), "absorb": True},
            "sign_momentum": {
                "lr": 0.1,
                "compressor": ScaledSign(scope="global"),
                "momentum": 0.5,
                "nonfinite": "zero",
            },
        },
        lambda kwargs: (
            "compressor_input" if isinstance(kwargs["compressor"], ScaledSign) else "residual",
            *_momentum_buffer(kwargs),
        ),
        tensors={},
        ulp=4.0,
        clips=False,
    ),
    Entry(
        "ef21",
        pysmooth.EF21,
        {
            "main": {
                "lr": 0.1,
                "compressor": TopK(ratio=0.05),
                "eta": 0.3,
                "normalize": True,
                "weight_decay": 0.1,
            },
            "one_pass": {"lr": 0.1, "compressor": TopK(ratio=0.05), "init": "full"},
            "one_pass_momentum": {"lr": 0.1, "compressor": TopK(ratio=0.05), "eta": 0.3},
            "rand_k": {"lr": 0.1, "compressor": RandK(k=5, scaled=False), "init": "zero"},
            "sign": {"lr": 0.1, "compressor": ScaledSign(), "normalize": True, "scope": "tensor"},
            "identity": {"lr": 0.1, "compressor": Identity(), "eta": 0.5, "init": "full"},
            "natural": {"lr": 0.1, "compressor": NaturalCompression(seed=1), "normalize": True},
            "qsgd": {"lr": 0.1, "compressor": QSGD(256, seed=1), "eta": 0.3},
        },
        lambda kwargs: (
            "grad_estimate",
            *(("momentum_buffer",) if kwargs.get("eta") is not None else ()),
        ),
        ulp=4.0,
        clips=False,
    ),
    Entry(
        "ef21_plus",
        pysmooth.EF21Plus,
        {
            "main": {
                "lr": 0.1,
                "compressor": TopK(ratio=0.05),
                "eta": 0.3,
                "normalize": True,
                "weight_decay": 0.1,
            },
            "global": {"lr": 0.1, "compressor": TopK(k=40, scope="global")},
            "rand_k": {"lr": 0.1, "compressor": RandK(k=5, scaled=False), "init": "zero"},
            "sign": {"lr": 0.1, "compressor": ScaledSign(), "eta": 0.5},
            "natural": {"lr": 0.1, "compressor": NaturalCompression(seed=1), "init": "full"},
        },
        lambda kwargs: (
            "grad_estimate",
            *(("momentum_buffer",) if kwargs.get("eta") is not None else ()),
        ),
        ulp=4.0,
        clips=False,
    ),
    Entry(
        "ef21_sgd2m",
        pysmooth.EF21SGD2M,
        {
            "main": {"lr": 0.1, "compressor": HardThreshold(0.0123), "eta": 0.3},
            "top_k": {"lr": 0.1, "compressor": TopK(ratio=0.05), "eta": 0.3},
        },
        lambda _: ("grad_estimate", "momentum_buffer", "second_momentum_buffer"),
        ulp=4.0,
        clips=False,
    ),
)
