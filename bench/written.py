"""Steps written by hand in plain torch: where torch has no optimizer, and for torch.compile.

Each is a function of lists: parameters, gradients, and one list per state. Dense ones use foreach
ops, in the form that was seen to compile to fast code.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from .problem import Problem, Step, keeping

Lists = Sequence[list[Tensor]]
Function = Callable[[list[Tensor], list[Tensor], Lists, float, float], None]

RATIO = 0.01  # of top-k
LEVELS = 256  # of QSGD


@dataclass(frozen=True)
class Written:
    """A step: step(params, grads, states, lr, max_norm), and how many state lists it keeps.

    One that counts has a list more, of so many numbers: a Python number would compile anew each
    step. States are 0 at first, or the parameters.
    """

    step: Function
    states: int
    counts: int = 0
    starts: bool = False

    def eager(self, problem: Problem) -> Step:
        """The step as it is."""
        return self._bound(problem, self.step)

    def compiled(self, problem: Problem) -> tuple[Step, float]:
        """Under torch.compile(fullgraph=True), with the seconds it took to compile."""
        torch._dynamo.reset()
        # What it takes on a machine that has not compiled this before.
        inductor_config.force_disable_caches = True
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        function = torch.compile(self.step, fullgraph=True, dynamic=False)
        step = self._bound(problem, function)
        start = time.perf_counter()
        step()
        return step, time.perf_counter() - start

    def _bound(self, problem: Problem, function: Function) -> Step:
        params = [p.detach() for p in problem.params]
        make = torch.clone if self.starts else torch.zeros_like
        states = [[make(p) for p in params] for _ in range(self.states)]
        if self.counts:
            states.append([params[0].new_zeros(()) for _ in range(self.counts)])

        def step() -> None:
            grads = [p.grad for p in problem.params if p.grad is not None]
            with torch.no_grad():
                function(params, grads, states, problem.lr, problem.max_norm)

        step.starting = self.states if self.starts else 0  # type: ignore[attr-defined]
        return keeping(step, states)


def _norm(grads: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
    return norm


def _clipped(grads: list[Tensor], max_norm: float) -> list[Tensor]:
    return list(torch._foreach_mul(grads, torch.clamp(max_norm / (_norm(grads) + 1e-6), max=1.0)))


def agc_momentum(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Adaptive gradient clipping and momentum, one tensor at a time."""
    for p, g, m in zip(params, grads, states[0], strict=True):
        rows = tuple(range(1, p.dim())) if p.dim() > 1 else None
        norm = torch.linalg.vector_norm(p, dim=rows, keepdim=True).clamp(min=1e-3)
        coef = (0.01 * norm / torch.linalg.vector_norm(g, dim=rows, keepdim=True)).clamp(max=1.0)
        m.mul_(0.9).add_(g * coef)
        p.sub_(lr * m)


def agc_momentum_whole(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """The same with all coefficients in one tensor: Inductor 2.13 fails to fuse norm and update."""
    coefs = []
    for p, g in zip(params, grads, strict=True):
        rows = tuple(range(1, p.dim())) if p.dim() > 1 else None
        norm = torch.linalg.vector_norm(p, dim=rows).clamp(min=1e-3)
        coefs.append((0.01 * norm / torch.linalg.vector_norm(g, dim=rows)).clamp(max=1.0).view(-1))
    split = torch.split(torch.cat(coefs), [c.numel() for c in coefs])
    for p, g, m, c in zip(params, grads, states[0], split, strict=True):
        m.mul_(0.9).add_(g * c.view(-1, *(1,) * (p.dim() - 1)))
        p.sub_(lr * m)


def adagrad(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Clip and AdaGrad."""
    (sums,) = states
    g = _clipped(grads, max_norm)
    torch._foreach_addcmul_(sums, g, g)
    roots = torch._foreach_add(torch._foreach_sqrt(sums), 1e-10)
    torch._foreach_addcdiv_(params, g, roots, value=-lr)


def adamw(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Clip and AdamW."""
    first, second, (count,) = states
    step = count.add_(1)
    g = _clipped(grads, max_norm)
    torch._foreach_mul_(params, 1 - lr * 0.01)
    torch._foreach_lerp_(first, g, 0.1)
    torch._foreach_mul_(second, 0.999)
    torch._foreach_addcmul_(second, g, g, 0.001)
    roots = torch._foreach_mul(torch._foreach_sqrt(second), (1 - 0.999**step).rsqrt())
    torch._foreach_add_(roots, 1e-8)
    updates = torch._foreach_div(first, roots)
    torch._foreach_mul_(updates, -lr / (1 - 0.9**step))
    torch._foreach_add_(params, updates)


def adam_norm(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Clip and Adam-Norm; the first element of the second state is the accumulator, less 1."""
    first, second = states
    g = _clipped(grads, max_norm)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))
    total = second[0].view(-1)[0]
    total.mul_(0.999).add_(0.001 * norm.square() - 0.001)
    torch._foreach_lerp_(first, g, 0.1)
    torch._foreach_add_(params, torch._foreach_mul(first, -lr / (total + 1).sqrt()))


def normalized(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """A step of length lr along a momentum that starts as the first gradient."""
    momentum, (count,) = states
    weight = torch.where(count == 0, 1.0, 0.1).to(count.dtype)
    count.add_(1)
    for g, m in zip(grads, momentum, strict=True):
        m.lerp_(g, weight)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(m) for m in momentum]))
    for p, m in zip(params, momentum, strict=True):
        p.sub_(lr / norm * m)


def signum(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Signum."""
    (momentum,) = states
    torch._foreach_mul_(momentum, 0.9)
    torch._foreach_add_(momentum, grads, alpha=0.1)
    torch._foreach_add_(params, torch._foreach_sign(momentum), alpha=-lr)


def signum_loop(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Signum, one tensor at a time."""
    for p, g, m in zip(params, grads, states[0], strict=True):
        m.mul_(0.9).add_(g, alpha=0.1)
        p.sub_(lr * torch.sign(m))


def lion(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Lion."""
    (momentum,) = states
    torch._foreach_mul_(params, 1 - lr * 0.01)
    signs = torch._foreach_sign(torch._foreach_lerp(momentum, grads, 0.1))
    torch._foreach_add_(params, signs, alpha=-lr)
    torch._foreach_lerp_(momentum, grads, 0.01)


def lion_loop(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Lion, one tensor at a time."""
    for p, g, m in zip(params, grads, states[0], strict=True):
        p.mul_(1 - lr * 0.01).sub_(lr * torch.sign(m.lerp(g, 0.1)))
        m.lerp_(g, 0.01)


def l0l1(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """(L0,L1)-GD, L0 = L1 = 1."""
    torch._foreach_add_(params, torch._foreach_mul(grads, -lr / (1 + _norm(grads))))


def l0l1_loop(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """The same, one tensor at a time."""
    size = lr / (1 + torch.sqrt(torch.stack([(g * g).sum() for g in grads]).sum()))
    for p, g in zip(params, grads, strict=True):
        p.sub_(g * size)


def polyak(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """GD-PS of a loss that is 1 above its least value."""
    torch._foreach_add_(params, torch._foreach_mul(grads, -lr / _norm(grads).square()))


def polyak_loop(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """The same, one tensor at a time."""
    size = lr / torch.stack([(g * g).sum() for g in grads]).sum()
    for p, g in zip(params, grads, strict=True):
        p.sub_(g * size)


def adgd(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """AdGD whose step size does not grow: it would for ever, where gradients do not change."""
    before, (size, last) = states
    changed, norm = _norm(torch._foreach_sub(grads, before)), _norm(grads)
    new = torch.where(changed > 0, torch.minimum(size, 0.5 * size * last / changed), size)
    new = torch.where(size > 0, new, lr)
    torch._foreach_add_(params, torch._foreach_mul(grads, -new))
    torch._foreach_copy_(before, grads)
    size.copy_(new)
    last.copy_(norm)


def adgd_loop(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """The same, one tensor at a time."""
    before, (size, last) = states
    changed = torch.stack([(g - b).square().sum() for g, b in zip(grads, before, strict=True)])
    norm = torch.stack([(g * g).sum() for g in grads]).sum().sqrt()
    held = 0.5 * size * last / changed.sum().sqrt()
    new = torch.where(changed.sum() > 0, torch.minimum(size, held), size)
    new = torch.where(size > 0, new, lr)
    for p, g, b in zip(params, grads, before, strict=True):
        p.sub_(g * new)
        b.copy_(g)
    size.copy_(new)
    last.copy_(norm)


def _triangles(grads: list[Tensor], numbers: list[Tensor], lr: float) -> tuple[Tensor, ...]:
    """Of STM-Max with L0 = 1 / lr, L1 = 1 and eta = 0.28: the step, and the weights."""
    count, total, curvature = numbers
    curvature.copy_(torch.maximum(curvature, 1 / lr + _norm(grads)))
    alpha, ahead = 0.14 * (count + 2), 0.14 * (count + 3)
    keep = total / (total + alpha)
    total.add_(alpha)
    count.add_(1)
    return alpha / curvature, keep, alpha / total, total / (total + ahead), ahead / (total + ahead)


def stm(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """(L0,L1)-STM."""
    y, z, numbers = states
    step, keep, admit, near, ahead = _triangles(grads, numbers, lr)
    torch._foreach_sub_(z, torch._foreach_mul(grads, step))
    torch._foreach_mul_(y, keep)
    torch._foreach_add_(y, torch._foreach_mul(z, admit))
    at = torch._foreach_add(torch._foreach_mul(y, near), torch._foreach_mul(z, ahead))
    torch._foreach_copy_(params, at)


def stm_loop(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """The same, one tensor at a time."""
    step, keep, admit, near, ahead = _triangles(grads, states[2], lr)
    for p, g, y, z in zip(params, grads, *states[:2], strict=True):
        z.sub_(g * step)
        y.mul_(keep).add_(z * admit)
        p.copy_(y * near + z * ahead)


def ef_sign(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Error feedback with the scaled sign, one tensor at a time."""
    for p, g, e in zip(params, grads, states[0], strict=True):
        v = e + lr * g
        c = v.abs().mean() * torch.where(v >= 0, 1.0, -1.0)
        p.sub_(c)
        e.copy_(v - c)


def ef_top_k(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Error feedback with top-k, as one writes it down."""
    for p, g, e in zip(params, grads, states[0], strict=True):
        v = (e + lr * g).flatten()
        chosen = torch.topk(v.abs(), math.ceil(RATIO * v.numel())).indices
        c = torch.zeros_like(v)
        c[chosen] = v[chosen]
        p.sub_(c.view_as(p))
        e.copy_((v - c).view_as(e))


def ef_top_k_in_place(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """The same with the fewest passes that torch ops allow: only chosen coordinates are written."""
    for p, g, e in zip(params, grads, states[0], strict=True):
        v = e.add_(g, alpha=lr).view(-1)
        k = math.ceil(RATIO * v.numel())
        chosen = torch.topk(v.abs(), k, sorted=False).indices
        p.view(-1).index_add_(0, chosen, v[chosen], alpha=-1)
        v.index_fill_(0, chosen, 0.0)


def ef21_top_k(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """EF21 with top-k, one tensor at a time."""
    for p, g, h in zip(params, grads, states[0], strict=True):
        d = (g - h).view(-1)
        k = math.ceil(RATIO * d.numel())
        chosen = torch.topk(d.abs(), k, sorted=False).indices
        h.view(-1).index_add_(0, chosen, d[chosen])
        p.sub_(h, alpha=lr)


def ef_qsgd(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Error feedback with QSGD, one tensor at a time."""
    for p, g, e in zip(params, grads, states[0], strict=True):
        v = e + lr * g
        level = torch.linalg.vector_norm(v) / LEVELS
        n = torch.floor(v.abs() / level + torch.rand_like(v))
        c = n * level * torch.sign(v)
        p.sub_(c)
        e.copy_(v - c)


def ef_natural(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Error feedback with natural compression: random digits carry over into the exponent."""
    for p, g, e in zip(params, grads, states[0], strict=True):
        v = e + lr * g
        bits = v.view(torch.int32)
        noise = torch.randint_like(bits, 1 << 23)
        c = (bits + noise & ~((1 << 23) - 1)).view(torch.float32)
        p.sub_(c)
        e.copy_(v - c)


def ef21_plus_top_k(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """EF21+ with top-k, one tensor at a time."""
    for p, g, h in zip(params, grads, states[0], strict=True):
        k = math.ceil(RATIO * g.numel())
        d = (g - h).view(-1)
        chosen = torch.topk(d.abs(), k, sorted=False).indices
        moved = h.flatten().index_add_(0, chosen, d[chosen])
        w = g.view(-1)
        chosen = torch.topk(w.abs(), k, sorted=False).indices
        direct = torch.zeros_like(w).index_copy_(0, chosen, w[chosen])
        better = torch.linalg.vector_norm(w - direct) < torch.linalg.vector_norm(w - moved)
        h.copy_(torch.where(better, direct, moved).view_as(h))
        p.sub_(h, alpha=lr)


def clip21_sgd2m_noise(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Clip21-SGD2M with Gaussian noise, one tensor at a time around one norm."""
    momentum, estimates, servers = states
    distances = []
    for g, v, h in zip(grads, momentum, estimates, strict=True):
        v.mul_(0.9).add_(0.1 * g)
        distances.append(v - h)
    norm = torch.sqrt(torch.stack([(d * d).sum() for d in distances]).sum())
    coef = torch.clamp(max_norm / norm, max=1.0)
    for p, h, s, d in zip(params, estimates, servers, distances, strict=True):
        u = coef * d
        h.add_(u)
        s.add_(u + torch.randn_like(u))
        p.sub_(lr * s)


def clip21_sgd2m(
    params: list[Tensor], grads: list[Tensor], states: Lists, lr: float, max_norm: float
) -> None:
    """Clip21-SGD2M, one tensor at a time around one norm."""
    momentum, estimates = states
    distances = []
    for g, v, h in zip(grads, momentum, estimates, strict=True):
        v.mul_(0.9).add_(0.1 * g)
        distances.append(v - h)
    norm = torch.sqrt(torch.stack([(d * d).sum() for d in distances]).sum())
    coef = torch.clamp(max_norm / norm, max=1.0)
    for p, h, d in zip(params, estimates, distances, strict=True):
        h.add_(coef * d)
        p.sub_(lr * h)
