"""Two optimizers of the same parameters, on two backends, that live through the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from battery import Snapshot, all_params, same_bits
from registry import Entry
from torch import Tensor

from pysmooth.engine.recipe import SCALARS

LAYOUTS = ("contiguous", "contiguous", "transposed", "sliced", "offset", "gapped")
REFUSED = (ValueError, TypeError, RuntimeError)  # what bad input may raise; anything else is a bug


class Form(NamedTuple):
    """A tensor to be made: twice, and equal."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    scale: float
    seed: int

    def make(self) -> Tensor:
        gen = torch.Generator().manual_seed(self.seed)
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        t = (torch.randn(self.shape, generator=gen, dtype=wide) * self.scale).to(self.dtype)
        if self.layout == "transposed":
            order = tuple(reversed(range(t.ndim)))
            return t.permute(order).contiguous().permute(order)
        if self.layout == "sliced":
            return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
        if self.layout == "offset":
            return torch.cat([torch.zeros(1, dtype=t.dtype), t.reshape(-1)])[1:].view(t.shape)
        if self.layout == "gapped":  # rows farther apart than they are long
            wider = torch.full(
                (*t.shape[:-1], t.shape[-1] + 3) if t.ndim else (1,), 7, dtype=t.dtype
            )
            part = wider[..., : t.shape[-1]] if t.ndim else wider[0]
            part.copy_(t)
            return part
        if self.layout == "expanded":
            return t.reshape(-1)[:1].reshape((1,) * t.ndim).expand(t.shape) if t.numel() else t
        return t


class World:
    """One of the two. Its tensors are numbered alike in both."""

    def __init__(self, entry: Entry, kwargs: Mapping[str, Any], forms: list[Form], backend: str):
        self.entry, self.kwargs, self.backend = entry, kwargs, backend
        self.params = [torch.nn.Parameter(form.make()) for form in forms]
        self.optimizer = entry.make(self.params, backend=backend, **copy.deepcopy(kwargs))

    def replace(self, optimizer: torch.optim.Optimizer) -> None:
        """Goes on with a copy, and the copy's parameters."""
        self.optimizer, self.params = optimizer, all_params(optimizer)

    def groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of all groups, and whose they are."""
        return [
            {k: list(map(id, v)) if k == "params" else v for k, v in group.items()}
            for group in self.optimizer.param_groups
        ]


Action = Callable[[World], None]


def attempt(world: World, action: Action) -> Exception | None:
    """What the action raised, of what it may raise."""
    try:
        action(world)
    except REFUSED as error:
        return error
    return None


def largest(value: Any) -> float:
    """The largest finite magnitude in a tensor."""
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_sparse:
        return 0.0
    value = value.detach().resolve_conj()
    size = (torch.view_as_real(value) if value.is_complex() else value).abs().double()
    return float(size[size.isfinite()].max()) if size.isfinite().any() else 0.0


def alike(a: Any, b: Any, slack: float, key: str = "", size: float = 0.0) -> bool:
    """Whether two values agree: tensors to `slack` units in the last place.

    Of their largest element, or of `size`, what they were made of: a difference that cancels out
    leaves rounding.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0 or same_bits(a, b):
        return True
    x, y = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    x, y = x.double(), y.double()
    if not torch.equal(x.isnan(), y.isnan()):
        return False
    x, y = x.nan_to_num(0.0), y.nan_to_num(0.0)
    infinite = x.isinf() | y.isinf()
    if not torch.equal(x[infinite], y[infinite]):
        return False
    x, y = x[~infinite], y[~infinite]
    if x.numel() == 0:
        return True
    if not a.dtype.is_floating_point and not a.dtype.is_complex:
        return torch.equal(x, y)
    # Norms of float32 gradients are summed up in float32, and then kept in float64.
    coarse = key in SCALARS and a.dtype == torch.float64
    info = torch.finfo(torch.float32 if coarse else a.dtype)
    bound = slack * (info.eps * max(largest(a), largest(b), size) + info.tiny)
    return float((x - y).abs().max()) <= bound


def differences(
    a: Snapshot,
    b: Snapshot,
    slack: float,
    before: Snapshot | None = None,
    *,
    sizes: Sequence[float] = (),
    lax: bool = False,
) -> list[str]:
    """Where two snapshots differ by more than that, given what they were one action before, and the
    sizes of the gradients.

    `lax`: a parameter may have states on one side only; nothing has entered them yet.
    """

    def size(i: int, key: str | None) -> float:
        if before is None or i >= len(before[0]):
            return 0.0
        if key is None:
            return largest(before[0][i])
        # What was sent went out of a residual, too, and may be too little to move 16 bits.
        moved = a[0][i].detach() - before[0][i] if a[0][i].shape == before[0][i].shape else None
        return max(largest(before[1][i].get(key)), largest(moved), sizes[i])

    out = []
    for i, (x, y) in enumerate(zip(a[0], b[0], strict=True)):
        if not alike(x, y, slack, size=size(i, None)):
            out.append(f"parameter {i}")
    for i, (x, y) in enumerate(zip(a[1], b[1], strict=True)):
        if slack > 0 and (a[0][i].numel() == 0 or (lax and not (x and y))):
            continue  # whether an empty tensor has states, and counts steps, is left open
        if x.keys() != y.keys():
            out.append(f"state keys of {i}: {sorted(x)} against {sorted(y)}")
            continue
        out += [f"state {k!r} of {i}" for k in x if not alike(x[k], y[k], slack, k, size(i, k))]
    return out


def _expanded(t: Tensor) -> bool:
    """A spoiled state that no step has looked at yet: its parameter had no gradient."""
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def take_over(world: World, other: World) -> None:
    """Gives the one world the other's numbers, so that errors do not add up."""
    with torch.no_grad():
        pairs = zip(all_params(world.optimizer), all_params(other.optimizer), strict=True)
        for p, q in pairs:
            p.detach().copy_(q.detach())
            for key, value in other.optimizer.state.get(q, {}).items():
                mine = world.optimizer.state[p].get(key)
                if isinstance(value, Tensor) and isinstance(mine, Tensor) and not _expanded(mine):
                    mine.copy_(value)
