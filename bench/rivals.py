"""The rivals: the same step by other means, each at its best."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

Step = Callable[[], object]


@dataclass
class Problem:
    """Parameters with gradients, and what to do with them; shared by all contestants."""

    params: list[Tensor]
    lr: float
    momentum: float
    max_norm: float


def _torch_sgd(problem: Problem, **kind: bool) -> Step:
    optimizer = torch.optim.SGD(problem.params, lr=problem.lr, momentum=problem.momentum, **kind)

    def step() -> None:
        clip_grad_norm_(problem.params, problem.max_norm)
        optimizer.step()

    return step


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
    """Clip and momentum SGD over lists, written for the compiler: it makes one pass of each."""
    norm = torch.sqrt(torch.stack([(g * g).sum() for g in grads]).sum())
    coef = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if momentum:
        for p, g, m in zip(params, grads, buffers, strict=True):
            m.mul_(momentum).add_(g * coef)
            p.sub_(lr * m)
    else:
        for p, g in zip(params, grads, strict=True):
            p.sub_(lr * coef * g)


@torch.no_grad()
def compiled(problem: Problem) -> tuple[Step, float]:
    """`handwritten` under torch.compile(fullgraph=True), with the seconds it took to compile."""
    torch._dynamo.reset()
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


def deepspeed_left_out() -> str:
    """Why DeepSpeed's CPU optimizers are not among the contestants."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed: not installed"
    return "DeepSpeed: its CPU optimizers are Adam, Adagrad and Lion; it has no SGD to compare with"


RIVALS: dict[str, Callable[[Problem], Step]] = {
    "torch for-loop": torch_loop,
    "torch foreach": torch_foreach,
    "torch fused": torch_fused,
}
COMPILED = "torch.compile"
