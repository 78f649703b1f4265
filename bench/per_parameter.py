"""A rival shape of GPU optimizers: Triton, with a launch for every parameter, as flashoptim has it.

After torch's `clip_grad_norm_`. The kernels are as plain as they get; what they show is what
launching parameter by parameter costs, and what one launch over all of them is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .problem import Problem, Step, keeping

BLOCK = 1024


@triton.jit
def _momentum(p, g, m, n, lr, momentum, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    step = momentum * tl.load(m + at, inside) + tl.load(g + at, inside).to(tl.float32)
    tl.store(m + at, step, inside)
    tl.store(p + at, tl.load(p + at, inside).to(tl.float32) - lr * step, inside)


@triton.jit
def _adamw(p, g, m, v, n, lr, b1, b2, eps, decay, c1, c2, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    grad = tl.load(g + at, inside).to(tl.float32)
    first = b1 * tl.load(m + at, inside) + (1 - b1) * grad
    second = b2 * tl.load(v + at, inside) + (1 - b2) * grad * grad
    tl.store(m + at, first, inside)
    tl.store(v + at, second, inside)
    kept = tl.load(p + at, inside).to(tl.float32) * (1 - lr * decay)
    tl.store(p + at, kept - lr * (first / c1) / (tl.sqrt(second / c2) + eps), inside)


def _states(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p, dtype=torch.float32) for p in params]


def _with_grads(problem: Problem) -> list[tuple[int, Tensor, Tensor]]:
    clip_grad_norm_(problem.params, problem.max_norm)
    return [(i, p, p.grad) for i, p in enumerate(problem.params) if p.grad is not None]


def sgd(problem: Problem) -> Step:
    """SGD with momentum."""
    buffers = _states(problem.params)

    @torch.no_grad()
    def step() -> None:
        for i, p, grad in _with_grads(problem):
            launch: Any = _momentum[(triton.cdiv(p.numel(), BLOCK),)]
            launch(p, grad, buffers[i], p.numel(), problem.lr, problem.momentum, block=BLOCK)

    return keeping(step, [buffers])


def adamw(problem: Problem) -> Step:
    """AdamW with betas (0.9, 0.999), eps 1e-8 and weight decay 0.01."""
    first, second = _states(problem.params), _states(problem.params)
    steps = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal steps
        steps += 1
        numbers = (problem.lr, 0.9, 0.999, 1e-8, 0.01, 1 - 0.9**steps, 1 - 0.999**steps)
        for i, p, grad in _with_grads(problem):
            launch: Any = _adamw[(triton.cdiv(p.numel(), BLOCK),)]
            launch(p, grad, first[i], second[i], p.numel(), *numbers, block=BLOCK)

    return keeping(step, [first, second])


STEPS: dict[str, Callable[[Problem], Step]] = {"sgd": sgd, "adamw": adamw}
