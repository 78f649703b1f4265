"""One case: what it is made of, and what is asserted of it."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import Any

import torch
from battery import Snapshot, snapshot
from registry import REGISTRY

from pysmooth import BackendError

from .actions import draw, draw_form
from .worlds import World, attempt, differences, largest, take_over

# Units in the last place of a tensor's largest element. One step sums up a norm in two orders and
# divides by it; what is compared starts from the same numbers in each step.
SLACK = 64.0
SLACK_F64 = 4096.0  # torch adds up 5,003 equal float64 numbers in sequence

DTYPES = (torch.float32,) * 4 + (torch.float64, torch.bfloat16, torch.float16, torch.complex64)
VARIANTS = [(entry, name, kwargs) for entry in REGISTRY for name, kwargs in entry.variants.items()]


class FindingError(AssertionError):
    """What must not be."""


def silent(_: str) -> None:
    """Says nothing."""


def run(seed: int, say: Callable[[str], Any] = silent) -> collections.Counter[str]:
    """Lives through one case; what was done, and how often it was refused."""
    rng = random.Random(seed)
    torch.set_num_threads(rng.choice((1, 1, 1, 3)))
    entry, name, kwargs = rng.choice(VARIANTS)
    dtype = rng.choice(DTYPES)
    forms = [draw_form(rng, dtype) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.2:
        policies = ("skip", "raise", "zero", "propagate")
        kwargs = {**kwargs, "nonfinite": rng.choice(policies)}
    counts: collections.Counter[str] = collections.Counter()
    label = f"{entry.name}-{name} {dtype}"
    say(f"{label} {forms} {kwargs}")
    try:
        native = World(entry, kwargs, forms, "cpu")
    except (ValueError, TypeError, BackendError) as error:
        counts["constructor (refused)"] += 1
        return counts | _refused_too(entry, kwargs, forms, error)
    eager = World(entry, kwargs, forms, "eager")
    for _ in range(rng.randrange(3, 8)):
        told, action = draw(rng, native)
        if not native.params:
            break
        before, groups = snapshot(native.optimizer), native.groups()
        error = attempt(native, action)
        counts[told] += 1
        say(f"{told}: {error!r}")
        if type(error).__name__ in ("BackendError", "UnsupportedError"):
            return counts  # the eager backend takes more
        other = attempt(eager, action)
        if _judges_idle(native, error or other) and (error is None) != (other is None):
            return counts
        if (error is None) != (other is None):
            raise FindingError(
                f"{entry.name}-{name} {dtype} {told}: cpu {error!r}, eager {other!r}"
            )
        if error is not None:
            counts[f"{told} (refused)"] += 1
            changed = differences(before, snapshot(native.optimizer), 0.0)
            if native.optimizer.absorbs:  # type: ignore[attr-defined]
                return counts  # what came before the one that was refused is in the residual
            if changed or groups != native.groups():
                raise FindingError(f"{label} {told}: {error!r}, yet changed {changed}")
        if told == "corrupt" and error is None:
            return (
                counts  # taken: a hyper-parameter that makes sense, or a state that starts afresh
            )
        apart = differences(
            snapshot(native.optimizer),
            snapshot(eager.optimizer),
            SLACK_F64 if dtype == torch.float64 else SLACK,
            before,
            sizes=[largest(p.grad) for p in native.params],
            lax=native.optimizer.absorbs,  # type: ignore[attr-defined]
        )
        if apart and _divides_noise(kwargs, before, native):
            apart = []
        if apart:
            for what, world in (("cpu", native), ("eager", eager)):
                say(f"{what}: {snapshot(world.optimizer)}")
            say(f"from: {before}\ngrads: {[p.grad for p in native.params]}")
            raise FindingError(f"{label} {told}: backends differ in {apart}")
        take_over(eager, native)
    return counts


def _judges_idle(world: World, error: Exception | None) -> bool:
    """Whether an error is about the states of a parameter that has no part in the step.

    The eager backend looks at all states in each step, the native one only where it needs to.
    """
    if world.optimizer.absorbs and "state" in str(error):  # type: ignore[attr-defined]
        return True  # who takes part is in the states themselves
    labels = world.optimizer.param_labels()  # type: ignore[attr-defined]
    idle = [n for n, p in zip(labels, world.params, strict=True) if p.grad is None or not p.numel()]
    return any(f"of parameter {n!r}" in str(error) and "state" in str(error) for n in idle)


def _divides_noise(kwargs: Any, before: Snapshot, world: World) -> bool:
    """Whether a step was normalised of which, after cancellation, only rounding was left."""
    if not kwargs.get("normalize") and world.entry.name != "normalized_sgd":
        return False
    after = snapshot(world.optimizer)[1]
    return any(
        0 <= largest(new[key]) <= 1e-4 * largest(old.get(key))
        for old, new in zip(before[1], after, strict=False)
        for key in new
    )


def _refused_too(entry: Any, kwargs: Any, forms: Any, error: Exception) -> collections.Counter[str]:
    try:
        World(entry, kwargs, forms, "eager")
    except type(error):
        return collections.Counter()
    if isinstance(error, BackendError):
        return collections.Counter()
    raise FindingError(f"{entry.name}: the constructor refuses on one backend only: {error!r}")
