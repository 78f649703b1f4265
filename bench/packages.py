"""Rivals from other packages: measured where they are installed, else said to be missing.

`pip install --group rivals` of a checkout installs those that run on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .problem import Problem, Step, torch_step

DEEPSPEED = "DeepSpeed CPU"
PER_PARAMETER = "Triton per parameter"  # bench/per_parameter.py
FLASH = "flashoptim plain"  # its path without a GPU: no quantization, no masters, no kernels
_PLAIN: dict[str, Any] = {"quantize": False, "master_weight_bits": None, "fused": False}


class MissingError(Exception):
    """A rival that cannot run here, and why."""


@dataclass(frozen=True)
class Package:
    """Where an optimizer is imported from, and where its parameters may be.

    `same_step` is false for one that does another step under the same name: it keeps its states in
    8 bits, say. Its time is shown, beside how far its numbers are off. `compiles` says that it does
    so at its first step, for minutes if there are thousands of tensors.
    """

    module: str
    devices: tuple[str, ...]
    same_step: bool = True
    compiles: bool = False

    def installed(self) -> bool:
        """Whether the package is there, without importing it."""
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None


PACKAGES = {
    DEEPSPEED: Package("deepspeed.ops", ("cpu",)),
    "bitsandbytes": Package("bitsandbytes.optim", ("cpu", "cuda")),
    "bitsandbytes 8-bit": Package("bitsandbytes.optim", ("cpu", "cuda"), same_step=False),
    "heavyball": Package("heavyball", ("cpu", "cuda"), compiles=True),
    "optimi": Package("optimi", ("cpu", "cuda")),
    "pytorch_optimizer": Package("pytorch_optimizer", ("cpu", "cuda")),
    "flashoptim": Package("flashoptim", ("cuda",), same_step=False),
    FLASH: Package("flashoptim", ("cpu",)),
    PER_PARAMETER: Package("triton", ("cuda",)),
    "apex fused": Package("apex.optimizers", ("cuda",)),
    "TransformerEngine fused": Package("transformer_engine.pytorch.optimizers", ("cuda",)),
}


def present(name: str, device: str) -> bool:
    """Whether a rival is installed and takes parameters of the device; torch's always are."""
    package = PACKAGES.get(name)
    if package is None:
        return True
    return device.split(":")[0] in package.devices and package.installed()


def compiles(name: str) -> bool:
    """Whether a rival is a package that compiles at its first step."""
    package = PACKAGES.get(name)
    return package is not None and package.compiles


def left_out(device: str) -> list[str]:
    """A line for every package that could run on this device and is not installed."""
    kind = device.split(":")[0]
    return [
        f"{name}: not installed"
        for name, package in PACKAGES.items()
        if kind in package.devices and not package.installed()
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what packages say when they are imported or compile."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _of(
    name: str, optimizer: str, submodule: str = "", **kind: Any
) -> dict[str, Callable[[Problem], Step]]:
    """One optimizer of a package, after torch's clip_grad_norm_."""

    def make(problem: Problem) -> Step:
        try:
            with _quiet():
                # DeepSpeed's first one compiles its kernels, for minutes; later ones find them.
                module = importlib.import_module(PACKAGES[name].module + submodule)
                made = getattr(module, optimizer)(problem.params, lr=problem.lr, **kind)
        except Exception as error:
            raise MissingError(f"{name}: {error}") from error
        return torch_step(problem, made)

    return {name: make}


def _per_parameter(rule: str) -> dict[str, Callable[[Problem], Step]]:
    """A launch for every parameter."""

    def make(problem: Problem) -> Step:
        # Where there is no triton, nothing of it is imported.
        module = importlib.import_module("pysmooth.bench.per_parameter")
        step: Step = module.STEPS[rule](problem)
        return step

    return {PER_PARAMETER: make}


def sgd(momentum: float) -> dict[str, Callable[[Problem], Step]]:
    """SGD, by package; pytorch_optimizer's is torch's own, bitsandbytes' always has momentum."""
    return {
        **(_of("bitsandbytes", "SGD32bit", momentum=momentum) if momentum else {}),
        **_of(FLASH, "FlashSGD", momentum=momentum, **_PLAIN),
        **_of("heavyball", "SGD", consume_grad=False, beta=momentum),
        **_of("optimi", "SGD", momentum=momentum),
        **(_per_parameter("sgd") if momentum else {}),
    }


def adagrad() -> dict[str, Callable[[Problem], Step]]:
    """AdaGrad, by package."""
    return {
        **_of(DEEPSPEED, "DeepSpeedCPUAdagrad", ".adagrad"),
        **_of("bitsandbytes", "Adagrad32bit"),
    }


def signum() -> dict[str, Callable[[Problem], Step]]:
    """Signum with momentum 0.9, by package; pytorch_optimizer's AdamW is torch's own."""
    return _of("pytorch_optimizer", "SignSGD", momentum=0.9)


def lion() -> dict[str, Callable[[Problem], Step]]:
    """Lion with betas (0.9, 0.99) and weight decay 0.01, by package."""
    usual: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.01}
    return {
        **_of(DEEPSPEED, "DeepSpeedCPULion", ".lion", **usual),
        **_of("bitsandbytes", "Lion32bit", **usual),
        **_of("bitsandbytes 8-bit", "Lion8bit", **usual),
        **_of("flashoptim", "FlashLion", **usual),
        **_of(FLASH, "FlashLion", **_PLAIN, **usual),
        **_of("optimi", "Lion", **usual),
        **_of("pytorch_optimizer", "Lion", **usual),
    }


def adamw() -> dict[str, Callable[[Problem], Step]]:
    """AdamW with betas (0.9, 0.999), eps 1e-8 and weight decay 0.01, by package."""
    usual: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return {
        **_of(DEEPSPEED, "DeepSpeedCPUAdam", ".adam", adamw_mode=True, **usual),
        **_of("bitsandbytes", "AdamW32bit", **usual),
        **_of("bitsandbytes 8-bit", "AdamW8bit", **usual),
        **_of("heavyball", "AdamW", consume_grad=False, **usual),
        **_of("optimi", "AdamW", **usual),
        **_of("flashoptim", "FlashAdamW", **usual),
        **_of(FLASH, "FlashAdamW", **_PLAIN, **usual),
        **_of("apex fused", "FusedAdam", adam_w_mode=True, **usual),
        **_of("TransformerEngine fused", "FusedAdam", adam_w_mode=True, **usual),
        **_per_parameter("adamw"),
    }
