"""Which chains have a fused kernel: patterns of parts, and the optimizer that computes each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import optim
from .._errors import BackendError
from ..optim._base import FusedOptimizer
from . import parts as p
from .base import Chain, Part

Kwargs = dict[str, Any]
Found = dict[str, Part]
AnyClip = (p.Clip, p.AdaptiveClip)


class MisfitError(Exception):
    """A part that has the right place and the wrong settings."""

    def __init__(self, part: Part, why: str) -> None:
        super().__init__(why)
        self.part = part


@dataclass(frozen=True)
class Slot:
    """A place in a pattern: a name, what kinds of parts may stand there, whether one has to."""

    name: str
    kinds: tuple[type[Part], ...]
    optional: bool = True

    def __str__(self) -> str:
        text = " or ".join(kind.__name__ for kind in self.kinds)
        return f"[{text}]" if self.optional else text


@dataclass(frozen=True)
class Row:
    """One pattern. Decoupled decay is no slot: where it stands makes no difference.

    Attributes:
        slots: the parts, in order.
        decoupled: whether there may be a decoupled decay.
        build: the optimizer's class and arguments for the parts found, by slot; raises MisfitError.
    """

    names: str
    slots: tuple[Slot, ...]
    decoupled: bool
    build: Callable[[Found], tuple[Callable[..., FusedOptimizer], Kwargs]]

    @property
    def needs(self) -> list[Slot]:
        """The parts that have to be there."""
        return [slot for slot in self.slots if not slot.optional]

    def __str__(self) -> str:
        decay = " (Decay(decoupled=True) anywhere)" if self.decoupled else ""
        return " -> ".join(map(str, self.slots)) + decay


def _clip(found: Found) -> Kwargs:
    part = found.get("clip")
    if isinstance(part, p.AdaptiveClip):
        return {"clip": "agc", "agc_factor": part.factor, "agc_eps": part.eps}
    if not isinstance(part, p.Clip):
        return {"clip": "none"}
    kwargs = {"clip": part.mode, "max_norm": part.max_norm, "clip_eps": part.eps}
    return {**kwargs, "scope": part.scope, "norm_type": part.norm_type}


def _decay(found: Found) -> Kwargs:
    """Of the one decay that there may be."""
    part = found.get("decoupled", found.get("decay"))
    return {"weight_decay": part.weight_decay} if isinstance(part, p.Decay) else {}


def _one_scope(found: Found, part: p.Normalize | p.ScaleByNorm) -> Kwargs:
    """The clip's arguments, whose norm has to have the part's scope."""
    clip = found.get("clip")
    if isinstance(clip, p.Clip) and clip.mode != "value" and clip.scope != part.scope:
        raise MisfitError(
            clip, f"its scope is {clip.scope!r}, and {type(part).__name__}'s {part.scope!r}"
        )
    return {**_clip(found), "scope": part.scope}


def _start(part: p.Average, start: str) -> float:
    if part.start != start:
        raise MisfitError(part, f"it starts from {part.start!r}, not {start!r}")
    return part.decay


def _kernel(part: p.Compress, feedback: str) -> p.Compress:
    if part.feedback != feedback:
        raise MisfitError(part, f"its feedback is {part.feedback!r}, not {feedback!r}")
    if part.compressor.select is None and part.compressor.dense is None:
        raise MisfitError(part, f"{type(part.compressor).__name__} has no kernel")
    return part


def _sgd(found: Found) -> tuple[Any, Kwargs]:
    kwargs = {**_clip(found), **_decay(found), "decoupled_weight_decay": "decoupled" in found}
    m = found.get("momentum")
    if isinstance(m, p.Momentum):
        kwargs |= {"momentum": m.momentum, "dampening": m.dampening, "nesterov": m.nesterov}
    return optim.ClipSGD, kwargs


def _adam(found: Found) -> tuple[Any, Kwargs]:
    m = found["main"]
    assert isinstance(m, p.ScaleByAdam)
    own = {"betas": m.betas, "eps": m.eps, "amsgrad": m.amsgrad}
    cls = optim.AdamW if "decoupled" in found else optim.Adam
    return cls, {**_clip(found), **_decay(found), **own}


def _adagrad(found: Found) -> tuple[Any, Kwargs]:
    m = found["main"]
    assert isinstance(m, p.ScaleByAdagrad)
    start = m.initial_accumulator_value
    own = {"lr_decay": m.lr_decay, "eps": m.eps, "initial_accumulator_value": start}
    return optim.Adagrad, {**_clip(found), **_decay(found), **own}


def _sign(found: Found) -> tuple[Any, Kwargs]:
    m, average = found["main"], found.get("average")
    assert isinstance(m, p.Sign)
    momentum = _start(average, "zero") if isinstance(average, p.Average) else 0.0
    own = {"momentum": momentum, "scaled": m.scaled}
    return optim.SignSGD, {**_clip(found), **_decay(found), **own}


def _lion(found: Found) -> tuple[Any, Kwargs]:
    m = found["main"]
    assert isinstance(m, p.ScaleByLion)
    return optim.Lion, {**_clip(found), **_decay(found), "betas": m.betas}


def _normalized(found: Found) -> tuple[Any, Kwargs]:
    m, average = found["main"], found.get("average")
    assert isinstance(m, p.Normalize)
    momentum = _start(average, "first") if isinstance(average, p.Average) else 0.0
    own = {"momentum": momentum, "eps": m.eps}
    return optim.NormalizedSGD, {**_one_scope(found, m), **_decay(found), **own}


def _norm(found: Found) -> tuple[Any, Kwargs]:
    m, clip = found["main"], found.get("clip")
    assert isinstance(m, p.ScaleByNorm)
    kwargs = {**_one_scope(found, m), **_decay(found)}
    if kwargs.pop("norm_type", 2.0) != 2.0 and clip is not None:
        raise MisfitError(clip, "its norm is not Euclidean")
    if kwargs["clip"] == "value" and not m.coordinate_wise and clip is not None:
        raise MisfitError(clip, "mode='value' goes with ScaleByNorm(coordinate_wise=True) only")
    for name in ("b_init", "reweight", "delayed", "coordinate_wise", "eps"):
        kwargs[name] = getattr(m, name)
    if m.beta2 is None:
        return optim.MAdagradNorm, {**kwargs, "beta1": m.beta1}
    return optim.AdamNorm, {**kwargs, "betas": (m.beta1, m.beta2)}


def _ef(found: Found) -> tuple[Any, Kwargs]:
    m, momentum = found["main"], found.get("momentum")
    assert isinstance(m, p.Compress)
    kwargs: Kwargs = {"compressor": _kernel(m, "ef").compressor, **_clip(found), **_decay(found)}
    if isinstance(momentum, p.Momentum):
        if momentum.dampening != 0 or momentum.nesterov:
            raise MisfitError(momentum, "before Compress it takes no dampening and no nesterov")
        if momentum.momentum >= 1:
            raise MisfitError(momentum, "its momentum is not less than 1")
        kwargs["momentum"] = momentum.momentum
    return optim.EFSGD, kwargs


def _ef21(found: Found) -> tuple[Any, Kwargs]:
    m, normalize = found["main"], found.get("normalize")
    assert isinstance(m, p.Compress)
    kwargs: Kwargs = {"compressor": _kernel(m, "ef21").compressor, **_decay(found)}
    averages = [a for name in ("average", "second") if isinstance(a := found.get(name), p.Average)]
    if isinstance(normalize, p.Normalize):
        if normalize.eps != 0:
            raise MisfitError(normalize, "after Compress its eps is 0")
        kwargs |= {"normalize": True, "scope": normalize.scope}
    if len(averages) == 2 and averages[0] != averages[1]:
        raise MisfitError(averages[1], "it differs from the first Average")
    starts = (averages[0].start if averages else "first", m.start)
    if starts == ("zero", "first"):
        raise MisfitError(m, "it starts from the first value of an Average that starts from zero")
    inits = {("first", "zero"): "compressed", ("first", "first"): "full", ("zero", "zero"): "zero"}
    kwargs["init"] = inits[starts]
    if averages:
        kwargs["eta"] = 1 - averages[0].decay
    return optim.EF21SGD2M if len(averages) == 2 else optim.EF21, kwargs


def _clip21(found: Found) -> tuple[Any, Kwargs]:
    m, average = found["main"], found.get("average")
    assert isinstance(m, p.ClipDifference)
    kwargs = {"tau": m.tau, "scope": m.scope, **_decay(found)}
    if not isinstance(average, p.Average) and m.beta_hat == 1:
        return optim.Clip21, kwargs
    beta = 1 - _start(average, "zero") if isinstance(average, p.Average) else 1.0
    return optim.Clip21SGD2M, {**kwargs, "beta": beta, "beta_hat": m.beta_hat}


_CLIP = Slot("clip", AnyClip)
_DECAY = Slot("decay", (p.Decay,))
_MOMENTUM = Slot("momentum", (p.Momentum,))
_AVERAGE = Slot("average", (p.Average,))


def _main(kind: type[Part]) -> Slot:
    return Slot("main", (kind,), optional=False)


ROWS = (
    Row("ClipSGD", (_CLIP, _DECAY, _MOMENTUM), True, _sgd),
    Row("Adam, AdamW", (_CLIP, _DECAY, _main(p.ScaleByAdam)), True, _adam),
    Row("Adagrad", (_CLIP, _DECAY, _main(p.ScaleByAdagrad)), False, _adagrad),
    Row("MAdagradNorm, AdamNorm", (_CLIP, _main(p.ScaleByNorm)), True, _norm),
    Row("SignSGD, Signum", (_CLIP, _AVERAGE, _main(p.Sign)), True, _sign),
    Row("Lion", (_CLIP, _main(p.ScaleByLion)), True, _lion),
    Row("NormalizedSGD", (_CLIP, _AVERAGE, _main(p.Normalize)), True, _normalized),
    Row("EFSGD", (_CLIP, _DECAY, _MOMENTUM, _main(p.Compress)), False, _ef),
    Row(
        "EF21, EF21SGDM, EF21SGD2M, NormEF21, NormEF21SGDM",
        (
            _AVERAGE,
            Slot("second", (p.Average,)),
            _main(p.Compress),
            Slot("normalize", (p.Normalize,)),
        ),
        True,
        _ef21,
    ),
    Row("Clip21, Clip21SGD2M", (_AVERAGE, _main(p.ClipDifference)), True, _clip21),
)


def fused_table() -> list[tuple[str, str]]:
    """Every pattern that has a fused kernel, with the optimizers that compute it."""
    return [(str(row), row.names) for row in ROWS]


@dataclass
class _Attempt:
    """How far a row got: parts used, and what stopped it."""

    row: Row
    used: int
    why: str = ""


def _match(row: Row, chain: Chain) -> Found | _Attempt:
    found: Found = {}
    slots = iter(row.slots)
    for i, part in enumerate(chain.parts):
        label = f"part {i + 1}, {type(part).__name__},"
        if isinstance(part, p.Decay) and part.decoupled:
            if not row.decoupled:
                return _Attempt(row, i, f"{label} is in the way: its decay is decoupled")
            if found.keys() & {"decoupled", "decay"}:
                return _Attempt(row, i, f"{label} is in the way: there is another decay")
            found["decoupled"] = part
            continue
        for slot in slots:
            if isinstance(part, slot.kinds):
                found[slot.name] = part
                break
            if not slot.optional:
                return _Attempt(row, i, f"{label} is in the way of {slot}")
        else:
            return _Attempt(row, i, f"{label} is in the way: nothing can follow")
        if "decoupled" in found and "decay" in found:
            return _Attempt(row, i, f"{label} is in the way: there is another decay")
    for slot in slots:
        if not slot.optional:
            return _Attempt(row, len(chain.parts), f"{slot} is missing at the end")
    return found


def _holds(chain: Chain, row: Row) -> bool:
    return all(any(isinstance(part, s.kinds) for part in chain.parts) for s in row.needs)


def fused(chain: Chain) -> tuple[Callable[..., FusedOptimizer], Kwargs]:
    """The class and the arguments of the optimizer that computes this chain.

    Raises:
        BackendError: there is none; says what is in the way, and what is nearest.
    """
    attempts = []
    for row in ROWS:
        found = _match(row, chain)
        if isinstance(found, _Attempt):
            attempts.append(found)
            continue
        try:
            return row.build(found)
        except MisfitError as misfit:
            at = next(i for i, part in enumerate(chain.parts) if part is misfit.part)
            name = type(misfit.part).__name__
            # All parts have their place: nearer than any row that lacks one.
            attempts.append(_Attempt(row, len(chain.parts) + 1, f"part {at + 1}, {name}: {misfit}"))
    # Nearest is what is made of parts that are there, then what gets furthest.
    made = [a for a in attempts if a.row.needs and _holds(chain, a.row)] or attempts
    best = max(attempt.used for attempt in made)
    lines = [f"  {a.row} ({a.row.names}): {a.why}" for a in made if a.used == best]
    raise BackendError(
        f"no kernel computes {chain}. Nearest:\n"
        + "\n".join(lines)
        + "\nbackend='eager' runs any chain in plain torch"
    )
