"""The first gradient of full fine-tuning, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

InitGrad = Literal["sign", "raw"]


def collect_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    use: Callable[[str, Tensor], None],
    *,
    at_once: int | None = None,
) -> None:
    """Hands over the sum over batches of the gradient of each weight, and forgets it.

    The last backward gives a gradient away as soon as it has it, by a hook: with one batch no more
    than one layer's is ever there. With several, sums are kept until then, of `at_once` layers:
    each such set costs a walk over all batches.

    Args:
        model: its other parameters get no gradients; `requires_grad` is put back in the end.
        weights: whose gradients, by name.
        loss: `loss(model, batch)`.
        batches: gone through again for each set of layers.
        use: `use(name, gradient)`; called in backward.
        at_once: layers whose sums are kept; None for all.

    Raises:
        ValueError: there is no batch, or a weight has no gradient.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch")
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be at least 1; got {at_once}")
    names, step = list(weights), at_once or max(1, len(weights))
    needed = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    missing = set(names)
    try:
        for p, _, _ in needed:
            p.requires_grad_(False)
            p.grad = None
        for begin in range(0, len(names), step):
            chosen = {name: weights[name] for name in names[begin : begin + step]}
            for p in chosen.values():
                p.requires_grad_(True)
            _walk(model, chosen, loss, batches, use, missing)
            for p in chosen.values():
                p.requires_grad_(False)
    finally:
        for p, needs, grad in needed:
            p.requires_grad_(needs)
            p.grad = grad
    if missing:
        raise ValueError(f"the loss does not depend on {', '.join(sorted(missing))}")


def _walk(
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    loss: Callable[[Any, Any], Tensor],
    batches: list[Any],
    use: Callable[[str, Tensor], None],
    missing: set[str],
) -> None:
    """All batches; in the last one hooks give the sums away."""
    handles = []

    def give(name: str, p: Tensor) -> None:
        if p.grad is not None:
            use(name, p.grad)
            missing.discard(name)
            p.grad = None

    try:
        for i, batch in enumerate(batches):
            if i == len(batches) - 1:
                for name, p in chosen.items():
                    hook = functools.partial(give, name)
                    handles.append(p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            with torch.enable_grad():
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    for name, p in chosen.items():  # of layers that the last batch did not reach
        give(name, p)


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,) and V' (r, n) of the largest singular values, in float32 or wider.

    Exact where the shorter side is at most 512, else by ten subspace iterations from a fixed seed.
    """
    if not 0 < rank <= min(x.shape):
        raise ValueError(f"rank must be from 1 to {min(x.shape)} for {tuple(x.shape)}; got {rank}")
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if min(x.shape) <= 512:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u[:, :rank].contiguous(), s[:rank], vh[:rank].contiguous()
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(42)
        u, s, v = torch.svd_lowrank(x, q=rank, niter=10)
    return u, s, v.T.contiguous()


def first_step(gradient: Tensor, step: float, init_grad: InitGrad) -> Tensor:
    """The first step of full fine-tuning: AdamW's, -step * sign(g), or SGD's, -step * g."""
    return (gradient.sign() if init_grad == "sign" else gradient) * -step
