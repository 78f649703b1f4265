"""The rivals: the same step by other means, each at its best."""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.nn.utils import clip_grad_norm_

from pysmooth.engine.backends import Backend

Step = Callable[[], object]


@dataclass
class Problem:
    """Parameters with gradients, and what to do with them; shared by all contestants."""

    params: list[Tensor]
    lr: float
    momentum: float
    max_norm: float
    recorded: list[Tensor] | None = None  # the gradients, to be put back before every call
    backend: Backend = "auto"  # pysmooth's

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes what clipping did to the gradients: else only the first call would clip."""
        if self.recorded is not None:
            torch._foreach_copy_([p.grad for p in self.params if p.grad is not None], self.recorded)


def keeping(step: Step, keeps: object) -> Step:
    """The step, with what it keeps between calls noted: an optimizer, or lists of states."""
    step.keeps = keeps  # type: ignore[attr-defined]
    return step


def _torch_step(problem: Problem, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        clip_grad_norm_(problem.params, problem.max_norm)
        optimizer.step()

    return keeping(step, optimizer)


def _torch_sgd(problem: Problem, **kind: bool) -> Step:
    optimizer = torch.optim.SGD(problem.params, lr=problem.lr, momentum=problem.momentum, **kind)
    return _torch_step(problem, optimizer)


def torch_loop(problem: Problem) -> Step:
    """torch.optim.SGD, one tensor at a time."""
    return _torch_sgd(problem, foreach=False, fused=False)


def torch_foreach(problem: Problem) -> Step:
    """torch.optim.SGD with horizontally fused ops."""
    return _torch_sgd(problem, foreach=True)


def torch_fused(problem: Problem) -> Step:
    """torch.optim.SGD with its fused kernel: the fastest that ships with torch."""
    return _torch_sgd(problem, fused=True)


def handwritten(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: float,
    momentum: float,
    max_norm: float,
) -> None:
    """Clip and momentum SGD over lists, in the form that was seen to compile to the fastest code.

    Tried on GPT-2: a loop with (g * g).sum(), one with vector_norm, and this one with foreach ops.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    scaled = torch._foreach_mul(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    if momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, scaled)
        torch._foreach_add_(params, buffers, alpha=-lr)
    else:
        torch._foreach_add_(params, scaled, alpha=-lr)


@torch.no_grad()
def compiled(problem: Problem) -> tuple[Step, float]:
    """`handwritten` under torch.compile(fullgraph=True), with the seconds it took to compile."""
    torch._dynamo.reset()
    # What it takes on a machine that has not compiled this before.
    inductor_config.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    function = torch.compile(handwritten, fullgraph=True, dynamic=False)
    params = [p.detach() for p in problem.params]
    buffers = [torch.zeros_like(p) for p in params] if problem.momentum else []

    def step() -> None:
        grads = [p.grad for p in problem.params if p.grad is not None]
        with torch.no_grad():
            function(params, grads, buffers, problem.lr, problem.momentum, problem.max_norm)

    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


class MissingError(Exception):
    """A rival that cannot run here, and why."""


def _deepspeed(module: str, name: str, **kind: Any) -> Callable[[Problem], Step]:
    def make(problem: Problem) -> Step:
        try:
            optimizers = importlib.import_module(f"deepspeed.ops.{module}")
            # The first of them compiles its kernels, for minutes; later ones find them.
            optimizer = getattr(optimizers, name)(problem.params, lr=problem.lr, **kind)
        except Exception as error:
            raise MissingError(f"{name}: {error}") from error
        return _torch_step(problem, optimizer)

    return make


def deepspeed_adagrad() -> Callable[[Problem], Step]:
    """DeepSpeed's AdaGrad for parameters in host memory, after torch's clip_grad_norm_."""
    return _deepspeed("adagrad", "DeepSpeedCPUAdagrad")


def deepspeed_adamw() -> Callable[[Problem], Step]:
    """DeepSpeed's AdamW for parameters in host memory, after torch's clip_grad_norm_."""
    return _deepspeed("adam", "DeepSpeedCPUAdam", adamw_mode=True, weight_decay=0.01)


def _adamw_of(module: str) -> Callable[[Problem], Step]:
    """FusedAdam of a package for GPUs, as AdamW, after torch's clip_grad_norm_."""

    def make(problem: Problem) -> Step:
        try:
            fused = importlib.import_module(module).FusedAdam
            optimizer = fused(problem.params, lr=problem.lr, weight_decay=0.01, adam_w_mode=True)
        except Exception as error:
            raise MissingError(f"{module}: {error}") from error
        return _torch_step(problem, optimizer)

    return make


def apex_adamw() -> Callable[[Problem], Step]:
    """FusedAdam of apex: multi-tensor launches."""
    return _adamw_of("apex.optimizers")


def te_adamw() -> Callable[[Problem], Step]:
    """TransformerEngine's FusedAdam, which came from apex."""
    return _adamw_of("transformer_engine.pytorch.optimizers")


def present(name: str, device: str) -> bool:
    """Whether a rival is installed and takes parameters of the device."""
    if name not in INSTALLED:
        return True
    package, kind = INSTALLED[name]
    return device.startswith(kind) and importlib.util.find_spec(package) is not None


def deepspeed_left_out() -> list[str]:
    """A line where DeepSpeed is not installed."""
    return [] if present(DEEPSPEED, "cpu") else ["DeepSpeed: not installed"]


def torch_adagrad(**kind: Any) -> Callable[[Problem], Step]:
    """torch.optim.Adagrad after clip_grad_norm_."""
    return lambda p: _torch_step(p, torch.optim.Adagrad(p.params, lr=p.lr, **kind))


def torch_adamw(**kind: Any) -> Callable[[Problem], Step]:
    """torch.optim.AdamW after clip_grad_norm_."""
    return lambda p: _torch_step(p, torch.optim.AdamW(p.params, lr=p.lr, weight_decay=0.01, **kind))


def torch_adamw_masters(problem: Problem) -> Step:
    """Fused AdamW on float32 copies, as mixed precision is written by hand: out, step, and back."""
    params = [p.detach() for p in problem.params]
    masters = [torch.nn.Parameter(p.float()) for p in params]
    for m in masters:
        m.grad = torch.empty_like(m)
    optimizer = torch.optim.AdamW(masters, lr=problem.lr, weight_decay=0.01, fused=True)

    def step() -> None:
        clip_grad_norm_(problem.params, problem.max_norm)  # in 16 bits: the fastest place
        with torch.no_grad():
            grads = [p.grad for p in problem.params if p.grad is not None]
            torch._foreach_copy_([m.grad for m in masters if m.grad is not None], grads)
            optimizer.step()
            torch._foreach_copy_(params, [m.detach() for m in masters])

    return step


RIVALS: dict[str, Callable[[Problem], Step]] = {
    "torch for-loop": torch_loop,
    "torch foreach": torch_foreach,
    "torch fused": torch_fused,
}
COMPILED = "torch.compile"
EAGER = "eager"
IN_PLACE = "eager in place"
MASTERS = "torch fused with masters"
DEEPSPEED = "DeepSpeed CPU"
APEX = "apex fused"
TE = "TransformerEngine fused"
# What has to be installed for them, and where their parameters are.
INSTALLED = {
    DEEPSPEED: ("deepspeed", "cpu"),
    APEX: ("apex", "cuda"),
    TE: ("transformer_engine", "cuda"),
}
NAMES = [*RIVALS, EAGER, IN_PLACE, MASTERS, *INSTALLED, COMPILED]
