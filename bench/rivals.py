"""The rivals: the same step by other means, each at its best."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.nn.utils import clip_grad_norm_

from . import packages
from .problem import Problem, Step, keeping, torch_step


def not_compiled(what: str, error: Exception) -> str:
    """A line about a step that the compiler gave up on: others are measured all the same."""
    why = str(error).strip().splitlines()
    return f"{COMPILED} on {what}: {type(error).__name__}: {why[0] if why else ''}"


def _torch_sgd(problem: Problem, **kind: bool) -> Step:
    optimizer = torch.optim.SGD(problem.params, lr=problem.lr, momentum=problem.momentum, **kind)
    return torch_step(problem, optimizer)


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
    return keeping(step, [buffers]), time.perf_counter() - start


def torch_adagrad(**kind: Any) -> Callable[[Problem], Step]:
    """torch.optim.Adagrad after clip_grad_norm_."""
    return lambda p: torch_step(p, torch.optim.Adagrad(p.params, lr=p.lr, **kind))


def torch_adamw(**kind: Any) -> Callable[[Problem], Step]:
    """torch.optim.AdamW after clip_grad_norm_."""
    return lambda p: torch_step(p, torch.optim.AdamW(p.params, lr=p.lr, weight_decay=0.01, **kind))


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
# Those of bench/packages.py come with their packages.
NAMES = [*RIVALS, EAGER, IN_PLACE, MASTERS, *packages.PACKAGES, COMPILED]
