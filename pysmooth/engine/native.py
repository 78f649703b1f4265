"""The engine of the native CPU backend: keeps a plan alive, hands it the step's numbers."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import NonFiniteGradientError
from .amp import Amp
from .checks import check_gradient
from .numbers import Numbers
from .recipe import ABSORBED, SCALARS, ClipMode, Recipe
from .state import fill_state, new_states, version_roots

if TYPE_CHECKING:
    from .._cpu import Plan, StateSnapshot
    from ..distributed.exchange import Exchange
    from ..optim._base import FusedOptimizer

APPLIED, SKIPPED, NONFINITE, STALE = range(4)


class NativeEngine:
    """Steps through a `Plan`, rebuilt whenever anything but a gradient's address changed."""

    name = "cpu"

    def __init__(self, native: types.ModuleType) -> None:
        self._native = native
        self._plan: Plan | None = None
        self._built_for: tuple[object, ...] = ()
        self._numbers = Numbers([])
        self._states: StateSnapshot | None = None
        self._state_dicts: list[dict[str, Any]] = []
        self._unscale = 1.0
        # Parameters whose states were allocated for a step that has not happened yet, with what
        # their state dict held before; None where there was none.
        self._fresh: list[tuple[Tensor, dict[str, Any] | None]] = []
        self._last: tuple[list[float], list[float]] | None = None
        self._selections = (0, 0)  # of plans that are gone
        self._exchange: tuple[Exchange, bool] | None = None  # and whether it selects jointly
        self._places: dict[Tensor, tuple[int, int]] = {}  # in the plan: parameter, group

    def attach(self, exchange: Exchange, jointly: bool) -> None:
        """Has the next steps' sums go through an exchange; `jointly`: top-k as well."""
        self._exchange, self._built_for = (exchange, jointly), ()

    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One fused step: reduce where norms are needed, then apply."""
        unscale = amp.read()
        if unscale is None:
            return
        self._unscale = unscale
        groups = optimizer.param_groups
        recipes = optimizer.recipes()
        if recipes is not self._numbers.recipes:  # a list of recipes is replaced, never changed
            self._numbers = Numbers(recipes)
        hypers, clips = self._numbers.hypers, self._numbers.clips
        lists = [group["params"] for group in groups]
        threads = torch.get_num_threads()

        wanted = (len(optimizer.state), optimizer.hooks_held(), self._numbers.forms)
        numbers = (hypers, clips, threads, unscale, not optimizer.unscaled_by_scaler)
        plan = None
        try:
            plan = self._plan
            if plan is None or wanted != self._built_for or not self._holds(optimizer):
                plan = None
                plan = self._build(optimizer, recipes)
            outcome = plan.step(lists, *numbers)
            if outcome == STALE:
                self._discard_fresh(optimizer)
                plan = self._build(optimizer, recipes)
                outcome = plan.step(lists, *numbers)
                if outcome == STALE:
                    raise RuntimeError("parameters or states changed while the step was gathered")
            if outcome == NONFINITE:
                names = ", ".join(repr(name) for name in plan.nonfinite_names())
                raise NonFiniteGradientError(f"non-finite gradient in {names}")
            if outcome != APPLIED:
                self._discard_fresh(optimizer)
                optimizer.count_skipped()
            self._fresh = []
        except BaseException:
            # An interrupt may come when the step is done, and what it returned is lost.
            if plan is None or not plan.applied():
                self._discard_fresh(optimizer)
            self._fresh = []
            raise

    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Takes one gradient into the states, and frees it; False if the policy keeps it out."""
        try:
            for _ in range(2):
                plan = self._plan
                if (
                    plan is None
                    or len(optimizer.state) != self._built_for[0]
                    or p not in self._places
                    or optimizer.state.get(p) is not self._state_dicts[self._places[p][0]]
                ):
                    plan = self._build(optimizer, optimizer.recipes())
                place, g = self._places[p]
                first = not optimizer.state.get(p, {}).get(ABSORBED)
                recipe = optimizer.absorbing(optimizer.param_groups[g], first=first)
                outcome = plan.absorb(place, recipe.hyper, recipe.clip, torch.get_num_threads())
                if outcome != STALE:
                    break
                self._plan = None
            else:
                raise RuntimeError("parameters or states changed while a gradient was absorbed")
        except BaseException:
            self._discard_fresh(optimizer)
            raise
        if outcome != APPLIED:
            self._discard_fresh(optimizer)
        self._fresh = []
        return bool(outcome == APPLIED)

    def _holds(self, optimizer: FusedOptimizer) -> bool:
        """Whether the optimizer's states are in the dicts that the plan knows."""
        return self._states is not None and self._states.same(optimizer.state)

    def _build(self, optimizer: FusedOptimizer, recipes: list[Recipe]) -> Plan:
        self._selections = self.selections()
        self._plan = None
        optimizer.follow_params()
        params: list[Tensor] = []
        state_dicts: list[dict[str, Any]] = []
        groups: list[int] = []
        own: list[Recipe] = []
        first: list[bool] = []
        new: list[int] = []
        for index, (group, recipe) in enumerate(zip(optimizer.param_groups, recipes, strict=True)):
            for p in group["params"]:
                known = optimizer.state.get(p)
                own.append(recipe.of(p))
                missing = [k for k in own[-1].keys if known is None or known.get(k) is None]
                # Like torch, allocate for parameters that have a gradient, when they first do.
                # Where gradients are absorbed, nobody can ask later who has one.
                wanted = p.grad is not None or (optimizer.absorbs and p.requires_grad)
                if missing and wanted:
                    new.append(len(params))
                first.append(p.grad is not None and any(k in missing for k in own[-1].rule_keys))
                params.append(p)
                state_dicts.append({} if known is None else known)
                groups.append(index)
        try:
            self._allocate(optimizer, params, state_dicts, own, new)
            states = [
                s for d, recipe in zip(state_dicts, own, strict=True) for s in _live(d, recipe)
            ]
            self._plan = self._native.Plan(
                params=params,
                state_dicts=state_dicts,
                state_keys=[recipe.keys for recipe in own],
                rules=[recipe.rule for recipe in own],
                groups=groups,
                names=optimizer.param_labels(),
                first=first,
                state_roots=version_roots(states),
                scope=int(optimizer.scope),
                policy=int(optimizer.policy),
                norm_type=optimizer.norm_type,
                stage_scopes=[int(scope) for scope in optimizer.stage_scopes],
                select=optimizer.select_spec(),
                low_states=[_low_states(recipe) for recipe in own],
                param_storage=[int(recipe.param_storage) for recipe in own],
                by_rows=[recipe.clip.mode == ClipMode.AGC for recipe in own],
                sums=[optimizer.backward_sums(p) for p in params],
                absorbs=optimizer.absorbs,
            )
            if self._exchange is not None:
                exchange, jointly = self._exchange
                elements = [layout.elements for layout in exchange.layouts]
                self._plan.set_exchange(exchange, elements, jointly)
        except BaseException:
            self._discard_fresh(optimizer)
            raise
        self._state_dicts = state_dicts
        self._states = self._native.StateSnapshot(optimizer.state)
        self._places = {p: (i, g) for i, (p, g) in enumerate(zip(params, groups, strict=True))}
        self._built_for = (len(optimizer.state), optimizer.hooks_held(), Numbers(recipes).forms)
        return self._plan

    def _allocate(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        state_dicts: list[dict[str, Any]],
        recipes: list[Recipe],
        new: list[int],
    ) -> None:
        """Gives the parameters numbered in `new` the states they lack, filled."""
        labels = optimizer.param_labels() if new else []
        for i in new:
            check_gradient(params[i], labels[i])  # states may start as gradients
        lacking = [
            (i, key) for i in new for key in recipes[i].keys if state_dicts[i].get(key) is None
        ]
        for i in new:
            known = optimizer.state.get(params[i])
            self._fresh.append((params[i], None if known is None else dict(known)))
        with torch.no_grad():
            states = new_states([(params[i], key, recipes[i]) for i, key in lacking])
            counts = [s for s, (_, key) in zip(states, lacking, strict=True) if key in SCALARS]
            roots = {id(root) for root in version_roots(counts)}
            zeroed = [root for root in version_roots(states) if id(root) not in roots]
            self._native.fill_zero(zeroed, torch.get_num_threads())
            for (i, key), state in zip(lacking, states, strict=True):
                if (value := recipes[i].initial(key)) != 0.0:
                    sign = -1.0 if recipes[i].clip.maximize else 1.0
                    fill_state(state, value, params[i], sign * self._unscale)
        for (i, key), state in zip(lacking, states, strict=True):
            optimizer.state[params[i]][key] = state
            state_dicts[i] = optimizer.state[params[i]]

    def _discard_fresh(self, optimizer: FusedOptimizer) -> None:
        """Forgets states that were allocated for a step which then did not happen."""
        if not self._fresh:
            return
        for p, before in self._fresh:
            state = optimizer.state.pop(p, {})
            if before is not None:
                state.clear()
                state.update(before)
                optimizer.state[p] = state
        self._last = self._read()
        self._selections = self.selections()
        self._fresh, self._plan = [], None

    def _read(self) -> tuple[list[float], list[float]] | None:
        if self._plan is None:
            return self._last
        return (self._plan.norms(), self._plan.coefs()) if self._plan.reduced else None

    def selections(self) -> tuple[int, int]:
        """How many selections there were so far, and how many needed a second look."""
        now = (0, 0) if self._plan is None else self._plan.selections()
        return (self._selections[0] + now[0], self._selections[1] + now[1])

    def summed(self) -> int:
        """For how many gradients the last step used sums that were taken in backward."""
        return 0 if self._plan is None else self._plan.summed()

    def settle(self, optimizer: FusedOptimizer) -> int:
        """Skipped steps are counted as they happen."""
        return 0

    def norms(self) -> list[float] | None:
        """Norms of the last step per scope unit; None if it took none."""
        last = self._read()
        return None if last is None else last[0]

    def coefs(self) -> list[float] | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        last = self._read()
        return None if last is None else last[1]


def _low_states(recipe: Recipe) -> int:
    return sum(1 << i for i, key in enumerate(recipe.states) if key in recipe.low_states)


def _live(state: dict[str, Any], recipe: Recipe) -> list[Tensor]:
    return [state[key] for key in recipe.keys if isinstance(state.get(key), Tensor)]
