"""The engine of the eager backend: the reference implementation, on any device torch has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from .._errors import NonFiniteGradientError
from ..reference import Member, Passes, Storage
from .amp import Amp
from .checks import check_gradient, check_memory, check_state
from .recipe import ABSORBED, NORM_SQ, SCALE, STEP, ClipMode, Policy, Recipe, Scope, needs_reduce
from .state import fill_state, new_states

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer


class EagerEngine:
    """Runs the same stages in plain torch ops: reduce, finalize, apply."""

    name = "eager"

    def __init__(self) -> None:
        self._norms: Tensor | None = None
        self._coefs: Tensor | None = None
        self._checked: tuple[object, ...] = ()

    @torch.no_grad()
    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One step. The policies "skip" and "raise" wait for the device here."""
        unscale = amp.read()
        if unscale is None:
            return
        labels = iter(optimizer.param_labels())
        slots: list[tuple[int, Tensor, str]] = []  # (group, parameter, label)
        for index, group in enumerate(optimizer.param_groups):
            slots += [(index, p, next(labels)) for p in group["params"]]
        recipes = optimizer.recipes()
        live = [(g, p, label) for g, p, label in slots if _takes_part(optimizer, p)]
        self._check(optimizer, recipes, slots)

        coefs: list[Tensor | None] = [None] * len(live)
        self._norms = self._coefs = None
        wanted = not optimizer.absorbs and needs_reduce(optimizer.policy, recipes)
        if wanted and not self._reduce(optimizer, recipes, slots, live, coefs, unscale):
            optimizer.count_skipped()
            return
        number = {id(p): i for i, (_, p, _) in enumerate(slots)}
        if unscale != 1.0:
            one = torch.ones((), dtype=torch.float64)
            coefs = [(one if coef is None else coef) * unscale for coef in coefs]
        fresh = _allocate(optimizer, [(recipes[g].of(p), p) for g, p, _ in live], unscale)
        norm_sq = _accumulate(optimizer, recipes, slots, live, coefs, fresh)
        staged: dict[Any, list[Member]] = {}
        for (g, p, _), coef, first in zip(live, coefs, fresh, strict=True):
            recipe = recipes[g].of(p)
            storage = _storage(optimizer, recipe, p, number[id(p)])
            rule = _rule(recipe)
            if rule.staged is None:
                _apply(recipe, p, coef, storage, first=first, norm_sq=norm_sq.get(p))
            elif p.numel() > 0:
                member = _member(optimizer, recipe, p, coef, storage, group=g, first=first)
                staged.setdefault(rule.staged, []).append(member)
            if recipe.keeps_step and (rule.staged is None or p.numel() > 0):
                optimizer.state[p][STEP] += 1
        for step, members in staged.items():
            _apply_staged(optimizer, step, members)
        for p, (_, after) in norm_sq.items():
            optimizer.state[p][NORM_SQ].copy_(after)
        for _, p, _ in live if optimizer.absorbs else ():
            optimizer.state[p][ABSORBED] = 0

    @torch.no_grad()
    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Takes one gradient into the states, and frees it; False if the policy keeps it out."""
        groups = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        params = [q for group in optimizer.param_groups for q in group["params"]]
        number = next(i for i, q in enumerate(params) if q is p)
        g = groups[number]
        begins = not optimizer.state.get(p, {}).get(ABSORBED)
        recipe = optimizer.absorbing(optimizer.param_groups[g], first=begins).of(p)
        self._check(optimizer, optimizer.recipes(), [(g, p, optimizer.param_labels()[number])])
        if optimizer.policy.asks_first and not _finite(_grad(p)):
            return False
        (first,) = _allocate(optimizer, [(recipe, p)], 1.0)
        if p.numel() == 0:
            p.grad = None
            return True
        storage = _storage(optimizer, recipe, p, number)
        member = _member(optimizer, recipe, p, None, storage, group=g, first=first)
        take_in = _rule(recipe).absorb
        assert take_in is not None
        take_in(member)
        for kept, state in zip(storage.states, member.states, strict=True):
            if kept is not state:
                kept.copy_(state)
        held = optimizer.state[p]
        held[ABSORBED] = held.get(ABSORBED, 0) + 1
        p.grad = None
        return True

    def _check(
        self, optimizer: FusedOptimizer, recipes: list[Recipe], slots: list[tuple[int, Tensor, str]]
    ) -> None:
        written: list[tuple[str, Tensor]] = []
        for g, p, label in slots:
            check_gradient(p, label)
            written.append((f"parameter {label!r}", p))
            state = optimizer.state.get(p, {})
            recipe = recipes[g].of(p)
            for key in recipe.keys:
                if state.get(key) is not None:
                    check_state(p, label, key, state[key], recipe)
                    written.append((f"state {key!r} of parameter {label!r}", state[key]))
        forms = tuple((t.data_ptr(), t.shape, t.stride()) for _, t in written)
        if forms != self._checked:  # the one check that is not cheap
            check_memory(written)
            self._checked = forms

    def _reduce(
        self,
        optimizer: FusedOptimizer,
        recipes: list[Recipe],
        slots: list[tuple[int, Tensor, str]],
        live: list[tuple[int, Tensor, str]],
        coefs: list[Tensor | None],
        unscale: float,
    ) -> bool:
        """Fills in norms and coefficients; False if this step is to be skipped."""
        grads = [_grad(p) for _, p, _ in live]
        position = {id(p): i for i, (_, p, _) in enumerate(slots)}
        units: list[list[int]]  # positions in `live`, per scope unit
        if optimizer.scope == Scope.GLOBAL:
            units = [list(range(len(live)))]
        elif optimizer.scope == Scope.GROUP:
            units = [[i for i, (g, _, _) in enumerate(live) if g == u] for u in range(len(recipes))]
        else:
            units = [[] for _ in slots]
            for i, (_, p, _) in enumerate(live):
                units[position[id(p)]].append(i)
        norms = [reference.total_norm([grads[i] for i in u], optimizer.norm_type) for u in units]
        if optimizer.norm_type != 0:
            norms = [norm * unscale for norm in norms]
        every = [torch.ones((), dtype=torch.float64) for _ in slots]
        for unit, norm in zip(units, norms, strict=True):
            for i in unit:
                g, p, _ = live[i]
                if recipes[g].clip.mode == ClipMode.AGC and p.numel() > 0:
                    assert p.grad is not None
                    coef = reference.agc_coefficients(recipes[g].clip, p, p.grad, unscale)
                elif recipes[g].clip.mode != ClipMode.NONE:
                    coef = reference.clip_coefficient(recipes[g].clip, norm)
                else:
                    continue
                coefs[i] = coef
                every[position[id(p)]] = coef.double().min()
        device = norms[0].device if norms else torch.device("cpu")
        if norms:
            self._norms = torch.stack([n.to(device, torch.float64) for n in norms])
            self._coefs = torch.stack([c.to(device) for c in every]) if every else None
        if not optimizer.policy.asks_first:
            return True
        bad = [name for (_, _, name), g in zip(live, grads, strict=True) if not _finite(g)]
        if bad and optimizer.policy == Policy.RAISE:
            raise NonFiniteGradientError(
                "non-finite gradient in " + ", ".join(repr(name) for name in bad)
            )
        return not bad

    def selections(self) -> tuple[int, int]:
        """Selections are made by sorting here: none is counted."""
        return (0, 0)

    def summed(self) -> int:
        """No sums are taken in backward here."""
        return 0

    def settle(self, optimizer: FusedOptimizer) -> int:
        """Skipped steps are counted as they happen."""
        return 0

    def norms(self) -> Tensor | None:
        """Norms of the last step per scope unit; None if it took none."""
        return self._norms

    def coefs(self) -> Tensor | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        return self._coefs


def _takes_part(optimizer: FusedOptimizer, p: Tensor) -> bool:
    if optimizer.absorbs:
        return bool(optimizer.state.get(p, {}).get(ABSORBED, 0))
    return p.grad is not None


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    grad = p.grad.resolve_conj().resolve_neg()
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _finite(g: Tensor) -> bool:
    return bool(torch.isfinite(g).all())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _rule(recipe: Recipe) -> reference.EagerRule:
    return reference.RULES.get(recipe.rule) or reference.EAGER_RULES[recipe.rule]


def _allocate(
    optimizer: FusedOptimizer, members: list[tuple[Recipe, Tensor]], unscale: float
) -> list[bool]:
    """Gives parameters the states they lack, all or none; whether they lacked any of their rule."""
    made = [_lacking(optimizer, recipe, p, unscale) for recipe, p in members]
    for (recipe, p), states in zip(members, made, strict=True):
        if recipe.keys:
            optimizer.state[p].update(states)
    return [
        any(key in states for key in recipe.rule_keys)
        for (recipe, _), states in zip(members, made, strict=True)
    ]


def _lacking(
    optimizer: FusedOptimizer, recipe: Recipe, p: Tensor, unscale: float
) -> dict[str, Tensor]:
    """The states that the parameter lacks, filled."""
    state = optimizer.state.get(p, {})
    missing = [key for key in recipe.keys if state.get(key) is None]
    made = dict(zip(missing, new_states([(p, key, recipe) for key in missing]), strict=True))
    for key, new in made.items():
        fill_state(new, recipe.initial(key), p, -unscale if recipe.clip.maximize else unscale)
    return made


def _storage(optimizer: FusedOptimizer, recipe: Recipe, p: Tensor, number: int) -> Storage:
    state = optimizer.state[p] if recipe.keys else {}
    companion = recipe.param_storage.companion
    return Storage(
        _real(p),
        [_real(state[key]) for key in recipe.states],
        [key in recipe.low_states for key in recipe.states],
        recipe.param_storage.name,
        None if companion is None else state[companion],
        int(state[STEP]) if recipe.keeps_step else 0,
        number,
    )


def _apply(
    recipe: Recipe,
    p: Tensor,
    coef: Tensor | None,
    storage: Storage,
    *,
    first: bool,
    norm_sq: tuple[Tensor, Tensor] | None,
) -> None:
    if recipe.accumulates and norm_sq is None:
        return  # an empty tensor, and nothing else in its unit
    x, states = storage.load()
    _rule(recipe)(
        x,
        _grad(p),
        states,
        recipe.hyper,
        coef=None if coef is None else coef.to(p.device),
        clip=recipe.clip,
        first=first,
        step=storage.step + 1.0,
        norm_sq=norm_sq,
    )
    storage.keep(x, states)


def _accumulate(
    optimizer: FusedOptimizer,
    recipes: list[Recipe],
    slots: list[tuple[int, Tensor, str]],
    live: list[tuple[int, Tensor, str]],
    coefs: list[Tensor | None],
    fresh: list[bool],
) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """The squared norms that rules accumulate, before and after this step.

    All members of a scope unit that have a state move, with or without a gradient; one that just
    joined starts from where a member of its group is.
    """
    number = {p: i for i, (_, p, _) in enumerate(slots)}

    def unit_of(g: int, p: Tensor) -> int:
        return {Scope.GLOBAL: 0, Scope.GROUP: g, Scope.TENSOR: number[p]}[optimizer.scope]

    sums: dict[int, Tensor] = {}
    for (g, p, _), coef in zip(live, coefs, strict=True):
        if not recipes[g].accumulates or p.numel() == 0:
            continue
        clipped = _grad(p).double()
        if coef is not None:
            clipped = clipped * coef.to(p.device).double()
        square = clipped.square().sum()
        u = unit_of(g, p)
        sums[u] = sums[u] + square.to(sums[u].device) if u in sums else square
    new = {p for (_, p, _), first in zip(live, fresh, strict=True) if first}
    held = [(g, p) for g, p, _ in slots if optimizer.state.get(p, {}).get(NORM_SQ) is not None]
    veterans = {unit_of(g, p) + g * len(slots): p for g, p in held if p not in new}
    out = {}
    for g, p in held:
        u = unit_of(g, p)
        if u not in sums:
            continue
        source = veterans.get(u + g * len(slots), p) if p in new else p
        before = optimizer.state[source][NORM_SQ].to(p.device, copy=True)
        hyper = dict(zip(_rule(recipes[g]).hyper, recipes[g].hyper, strict=True))
        after = reference.accumulate(
            before, sums[u].to(p.device), keep=hyper["keep"], admit=hyper["admit"]
        )
        out[p] = (before, after)
    return out


def _member(
    optimizer: FusedOptimizer,
    recipe: Recipe,
    p: Tensor,
    coef: Tensor | None,
    storage: Storage,
    *,
    group: int,
    first: bool,
) -> Member:
    """The parameter as a staged rule sees it."""
    x, states = storage.load()
    absorbed = p.grad is None
    return Member(
        x,
        torch.empty(0)
        if absorbed
        else reference.gradient_in(
            _grad(p),
            x.dtype,
            None if coef is None else coef.to(p.device),
            recipe.clip,
            zero_nonfinite=optimizer.policy == Policy.ZERO,
        ),
        states,
        dict(zip(_rule(recipe).hyper, recipe.hyper, strict=True)),
        first,
        storage.step,
        storage.number,
        group,
        optimizer.state[p][SCALE] if recipe.keeps_scale else None,
        storage,
        p.is_complex(),
        absorbed,
    )


def _apply_staged(optimizer: FusedOptimizer, step: Any, members: list[Member]) -> None:
    scopes = [scope.name.lower() for scope in optimizer.stage_scopes]
    passes = Passes(
        scopes, getattr(optimizer, "compressor", None), getattr(optimizer, "chain", None)
    )
    for m, new in zip(members, step(members, passes), strict=True):
        m.storage.keep(new, m.states)
