"""The engine of the Triton backend: keeps a plan alive, and reads nothing back from the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._errors import BackendError
from ..triton_kernels import absorption
from ..triton_kernels.launch import captures
from ..triton_kernels.plan import Plan, Slot
from ..triton_kernels.rules import RULES, rule_for
from ..triton_kernels.selection import MOST_BLOCK
from ..triton_kernels.specs import IN_BLOCK, NO_SELECTION, Method
from ..triton_kernels.table import GROUP_WORDS
from ..triton_kernels.words import NO_AMP, group_words, packed
from .amp import Amp
from .backends import native_module
from .device import Member, Told, gradient_of, on_device
from .device_absorb import AbsorbingEngine, stand_in
from .numbers import Numbers, form_of
from .recipe import (
    ABSORBED,
    GRADIENT,
    NORM_SQ,
    SCALE,
    STEP,
    ClipMode,
    ParamStorage,
    Policy,
    Recipe,
    needs_reduce,
)
from .spread import Spread, Sums
from .state import version_roots

if TYPE_CHECKING:
    from .._cpu import Watch
    from ..optim._base import FusedOptimizer

LATE = ("cuda",)  # devices that work behind the host's back
Form = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]


class _Given(Numbers):
    """And as kernels read them."""

    def __init__(self, recipes: list[Recipe], *, late: bool = False) -> None:
        super().__init__(recipes, late=late)
        self.forms = tuple(_form_of_recipe(recipe) for recipe in recipes)
        rows = (group_words(r.hyper, r.clip, r.accumulates) for r in recipes)
        self.words = b"".join(rows)


class TritonEngine(AbsorbingEngine):
    """Steps through a `Plan`, rebuilt whenever anything but a gradient's address changed."""

    name = "triton"

    def __init__(self) -> None:
        super().__init__()
        self._plan: Plan | None = None
        self._built_for: tuple[object, ...] = ()
        self._given = _Given([])
        self._states: list[list[tuple[str, Tensor, int]]] = []  # with their addresses
        self._addresses: list[int] = []
        self._forms: list[Form] = []
        self._roots: list[Tensor] = []
        self._params: list[Tensor] = []
        self._watch: Watch | None = None  # where the native module can tell
        self._resolved: list[Tensor | None] = []
        self._absorbed_for: list[tuple[object, ...]] = []  # what their passes were made for
        self._selections = (0, 0)  # of plans that are gone
        self._spread: Spread | None = None  # where parameters are parts of larger ones

    def attach(self, sums: Sums, jointly: bool) -> None:
        """Has the next steps' sums go over processes.

        Raises:
            BackendError: for what would take more than that.
        """
        if sums.process_group is not None or jointly:
            what = "compress='global'" if jointly else "process_group"
            raise BackendError(f"the triton backend takes no {what}; the cpu and cuda backends do")
        self._spread, self._built_for = Spread(sums, jointly), ()

    # Without torch.no_grad, as in cuda.py: what could be recorded is done in `_gathered`.
    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One fused step: reduce where norms are needed, finalize, apply."""
        recipes = optimizer.recipes()
        given = self._given
        if recipes is not given.recipes:
            late = any(self.reads(optimizer.late_lr(g)) for g in optimizer.param_groups)
            given = self._given = _Given(recipes, late=late)
        spread = self._spread
        if spread is not None and spread.look():
            self.settled(optimizer)
        watch, addresses = self._watch, None
        if watch is not None and self._built_for == self._form(optimizer, given):
            addresses = watch.look(optimizer.param_groups, optimizer.state)
        written: list[Tensor] | None = None
        if addresses is None:
            addresses, written = self._gathered(optimizer, given)
        plan = self._plan
        assert plan is not None
        numbers = NO_AMP
        held: list[Tensor | None] = []
        if amp.scale is not None or amp.found_inf is not None:
            held = [on_device(plan.device, t) for t in amp]
            numbers = packed(0 if t is None else t.data_ptr() for t in held)
        if spread is not None and captures(plan.device):
            raise BackendError(
                "backend 'triton' cannot capture in a CUDA graph what works on several processes"
            )
        rates = self._rates(optimizer, recipes) if given.late else []
        captured = plan.run(addresses, given.words, numbers, held=rates)
        if optimizer.absorbs:
            written = self.forget_absorbed(optimizer)
        if captured:
            optimizer.keep_for_graphs(plan)
            self._fresh = {}  # a replay may use the states at any time
        if written is not None:
            torch.autograd.graph.increment_version([*written, *self._roots])
        elif watch is not None:
            watch.count_written()
        if spread is not None:
            spread.after()
        if plan.device.type == "cpu":  # the interpreter: there is nothing to wait for
            self.settled(optimizer)

    def _rates(self, optimizer: FusedOptimizer, recipes: list[Recipe]) -> list[tuple[int, Tensor]]:
        """Learning rates that kernels read on their device, with their places in the words."""
        return [
            (index * GROUP_WORDS.value + RULES[recipe.rule].hyper.index("lr"), self._rate(lr))
            for index, (recipe, group) in enumerate(
                zip(recipes, optimizer.param_groups, strict=True)
            )
            if isinstance(lr := optimizer.late_lr(group), Tensor) and self.reads(lr)
        ]

    def reads(self, value: object) -> bool:
        """Whether kernels read this learning rate where it is: on the device."""
        return isinstance(value, Tensor) and value.device.type in LATE

    def _rate(self, lr: Tensor) -> Tensor:
        plan = self._plan
        assert plan is not None
        if lr.device != plan.device or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"lr is a {lr.dtype} tensor on {lr.device}; the triton backend reads float32 and "
                f"float64 on the parameters' device, {plan.device}"
            )
        return lr.detach()

    @torch.no_grad()
    def _gathered(self, optimizer: FusedOptimizer, given: _Given) -> tuple[bytes, list[Tensor]]:
        """Addresses of gradients, and who has one, asked in Python; with a new plan if need be."""
        if self._plan is None or not self._fits(optimizer, given):
            self._build(optimizer, given)
        grads = self._gradients()
        if grads is None:  # of another dtype or layout than before
            self._build(optimizer, given)
            grads = self._gradients()
            assert grads is not None
        # Kept until the step is enqueued: what was resolved lives nowhere else.
        self._resolved = [g for g, _ in grads]
        written = [p for p, (g, _) in zip(self._params, grads, strict=True) if g is not None]
        return packed(address for _, address in grads), written

    # ---- what a step reads ---------------------------------------------------------------------

    def _fits(self, optimizer: FusedOptimizer, given: _Given) -> bool:
        """Whether the plan is of these parameters, and all is where it was."""
        if self._built_for != self._form(optimizer, given):
            return False
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if len(params) != len(self._members):
            return False
        for p, known, address, states in zip(
            params, self._members, self._addresses, self._states, strict=True
        ):
            if p is not known.param or p.data_ptr() != address:
                return False
            state = optimizer.state.get(p, {}) if states else {}
            for key, tensor, place in states:
                if state.get(key) is not tensor or tensor.data_ptr() != place:
                    return False
            if p.grad is not None and known.recipe.keys and not known.held:
                return False
        return True

    def _gradients(self) -> list[tuple[Tensor | None, int]] | None:
        """Every parameter's gradient and its address, 0 for none; None if a form changed."""
        out: list[tuple[Tensor | None, int]] = []
        for member, form in zip(self._members, self._forms, strict=True):
            grad = member.param.grad
            if grad is None:
                out.append((None, 0))
                continue
            if grad.layout is not torch.strided:
                return None
            if grad.is_conj() or grad.is_neg():
                grad = grad.resolve_conj().resolve_neg()
            address = grad.data_ptr()
            if _form_of(grad) != form:
                return None
            out.append((grad, address if grad.numel() > 0 else 0))
        return out

    # ---- plans ---------------------------------------------------------------------------------

    def _build(self, optimizer: FusedOptimizer, given: _Given) -> Plan:
        recipes = given.recipes
        device = next((p.device for g in optimizer.param_groups for p in g["params"]), None)
        if device is not None and captures(device):
            raise BackendError(
                "backend 'triton' cannot prepare a step while a CUDA graph is captured; run the "
                "same step once before"
            )
        _check_select(optimizer)
        selections = self.selections()
        members = self.gather(optimizer, recipes, None)
        place = members[0].param.device if members else torch.device("cpu")
        try:
            grads = [self.form_of(optimizer, m.param) for m in members]
            slots = [_slot(m, grad) for m, grad in zip(members, grads, strict=True)]
            for s, m in zip(slots, members, strict=True):
                s.absorbed = optimizer.state.get(m.param, {}).get(ABSORBED, 0)
            method, reduce = _method(optimizer, recipes), None
            if (spread := self._spread) is not None:
                for s, m, (whole, _, counted) in zip(
                    slots, members, spread.parts([m.param for m in members]), strict=True
                ):
                    # Complex numbers are pairs here.
                    s.elements, s.counted = whole * (2 if m.param.is_complex() else 1), counted
                method, reduce = replace(method, parts=True), spread.add_up
            plan = Plan(slots, len(recipes), method, place, reduce)
        except BaseException:
            self.forget(optimizer, list(self._fresh))
            raise
        self._plan, self._selections = plan, selections
        taken = None if plan.absorption is None else plan.absorption.taken
        self._told = Told(plan.counters[:1], plan.spoiled, taken)
        if spread is not None and plan.parts is not None:
            torn = plan.parts.torn[:1]
            self._told = self._told._replace(torn=torn, complain=spread.sums.complain)
            spread.watch(torn)
        if plan.absorption is not None and place.type in LATE:
            torch.cuda.synchronize(place)  # backward may work on another stream than this
        self._states = [[(k, t, t.data_ptr()) for k, t in m.held.items()] for m in members]
        self._forms = [_form_of(g) for g in grads]
        self._addresses = [m.param.data_ptr() for m in members]
        self._params = [m.param for m in members]
        self._roots = version_roots([t for m in members for t in m.held.values()])
        self._watch = _watch(optimizer, members, self._roots)
        self._absorbed_for = [_absorbed_for(m.recipe) for m in members] * optimizer.absorbs
        self._built_for = self._form(optimizer, given)
        return plan

    # ---- gradients that states take in before the step ------------------------------------------

    def build(self, optimizer: FusedOptimizer) -> None:
        """Makes a plan for gradients to be taken in."""
        self._build(optimizer, _Given(optimizer.recipes()))

    def holds(self, optimizer: FusedOptimizer, place: int) -> bool:
        """Whether the plan is right for this parameter, its states and the gradient it has."""
        member = self._members[place]
        p = member.param
        if not self._built_for or len(optimizer.state) != self._built_for[0]:
            return False
        state = optimizer.state.get(p, {})
        if p.grad is None or p.data_ptr() != self._addresses[place]:
            return False
        for key, tensor, address in self._states[place]:
            if state.get(key) is not tensor or tensor.data_ptr() != address:
                return False
        recipe = optimizer.absorbing(optimizer.param_groups[member.group], first=True).of(p)
        known = self._absorbed_for[place] == _absorbed_for(recipe)
        return known and bool(member.held) and _form_of(gradient_of(p)) == self._forms[place]

    def take_in(self, optimizer: FusedOptimizer, place: int, recipe: Recipe, once: int) -> None:
        """Enqueues what takes the parameter's gradient in."""
        plan, member = self._plan, self._members[place]
        assert plan is not None
        assert plan.absorption is not None
        lr = optimizer.param_groups[member.group].get("lr")
        rate = self._rate(lr) if isinstance(lr, Tensor) and self.reads(lr) else None
        numbers = absorption.Numbers(recipe.hyper, once, recipe.clip.maximize, rate)
        grad = gradient_of(member.param)
        plan.absorption.take_in(place, grad.data_ptr(), numbers)
        if captures(plan.device):
            optimizer.keep_for_graphs(plan)

    def _form(self, optimizer: FusedOptimizer, given: _Given) -> tuple[object, ...]:
        """What a plan is built for, apart from tensors: recipes, and what `_method` looks at."""
        settings = (optimizer.scope, optimizer.policy, optimizer.norm_type, optimizer.stage_scopes)
        empty = () if self._spread is None else self._spread.sums.empty_live
        return len(optimizer.state), settings, optimizer.select_spec(), given.forms, empty

    def started(self) -> list[bool]:
        """Per parameter, whether a step of this plan has used its states. Waits for the device."""
        return [] if self._plan is None else [not flag for flag in self._plan.fresh.tolist()]

    def outdate(self) -> None:
        """The next step makes a new plan; what this one has left can still be read."""
        self._built_for = ()

    def lacks(self, recipe: Recipe) -> str | None:
        """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""
        return lacks(recipe)

    def reads_grad(self, rule: str) -> bool:
        """False for rules that rewrite a single stream."""
        return bool(RULES[rule].reads_grad)

    # ---- what the host may ask for ---------------------------------------------------------------

    def norms(self) -> Tensor | None:
        """Norms of the last step per scope unit; None if it took none."""
        plan = self._plan
        return None if plan is None or not plan.method.reduces else plan.norms.clone()

    def coefs(self) -> Tensor | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        plan = self._plan
        return None if plan is None or not plan.method.reduces else plan.coefs.clone()

    def selections(self) -> tuple[int, int]:
        """How many selections from lists there were, and how many took a second look.

        Blocks and short tensors are looked at as a whole, and not counted. Waits for the device.
        """
        if self._plan is None or self._plan.selection is None:
            return self._selections
        made, again = self._plan.selection.tallies.tolist()
        return (self._selections[0] + made, self._selections[1] + again)


def lacks(recipe: Recipe) -> str | None:
    """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""
    if recipe.rule not in RULES:
        return repr(recipe.rule)
    rule = RULES[recipe.rule]
    if any(not rule.low_states >> recipe.states.index(key) & 1 for key in recipe.low_states):
        return f"bfloat16 states of {recipe.rule!r}"
    return None


def _watch(optimizer: FusedOptimizer, members: list[Member], roots: list[Tensor]) -> Watch | None:
    """What tells quickly if all is where it was; None without the native module."""
    try:
        module = native_module()
    except BackendError:
        return None
    # One that lacks states is to have no gradient.
    lacking = [bool(m.recipe.keys) and not m.held for m in members]
    grads = [
        None if lacks_states or optimizer.absorbs else gradient_of(m.param)
        for m, lacks_states in zip(members, lacking, strict=True)
    ]
    watch: Watch = module.Watch(
        params=[m.param for m in members],
        grads=grads,
        state_dicts=[optimizer.state.get(m.param, {}) for m in members],
        state_keys=[tuple(m.held) for m in members],
        state=optimizer.state,
        roots=roots,
        aligns=True,
    )
    return watch


def _check_select(optimizer: FusedOptimizer) -> None:
    """Blocks are selected from, or summed up, by one program each."""
    select = optimizer.select_spec()
    if select is not None and select[1] == IN_BLOCK and MOST_BLOCK % select[4] != 0:
        raise BackendError(
            f"block_size {select[4]} does not divide {MOST_BLOCK}: the triton backend does not "
            "take it"
        )


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _form_of(grad: Tensor) -> Form:
    return (grad.dtype, grad.shape, grad.stride(), grad.data_ptr() % 16 == 0)


def _slot(member: Member, grad: Tensor) -> Slot:
    p, recipe, held = member.param, member.recipe, member.held
    fresh = 0 if p.numel() == 0 or not member.fresh else 2 - member.begins
    # A parameter without states has had no gradient: it is in the tables, and sits out.
    states = [_real(held[key] if held else p).detach() for key in recipe.states]
    name = rule_for(recipe.rule, recipe.hyper)
    if RULES[name].marks:
        states.append(torch.empty_like(_real(p.detach()), dtype=torch.uint8))
    low = sum(1 << i for i, key in enumerate(recipe.states) if held and key in recipe.low_states)
    numbers = (held.get(key) for key in (STEP, NORM_SQ, SCALE))
    starts = sum(1 << i for i, key in enumerate(recipe.states) if recipe.initial(key) == GRADIENT)
    companion = held.get(recipe.param_storage.companion or "")
    return Slot(
        *(name, member.group, _real(p.detach()), stand_in(_real(grad.detach())), states, *numbers),
        companion=companion,
        kept=int(recipe.param_storage) if held else int(ParamStorage.PLAIN),
        low=low,
        starts=starts,
        fresh=fresh,
        hyper=recipe.hyper,
        rows=_rows(p) if recipe.clip.mode == ClipMode.AGC else 0,
    )


def _rows(p: Tensor) -> int:
    """Slices along the first dimension; a vector or a number is one."""
    return 0 if p.numel() == 0 else p.shape[0] if p.dim() >= 2 else 1


def _method(optimizer: FusedOptimizer, recipes: list[Recipe]) -> Method:
    select = optimizer.select_spec()
    selects = select is not None and select[0] != NO_SELECTION
    return Method(
        scope=int(optimizer.scope),
        asks=optimizer.policy.asks_first,
        names=optimizer.policy == Policy.RAISE,
        zero=optimizer.policy == Policy.ZERO,
        norm_type=optimizer.norm_type,
        reduces=not optimizer.absorbs and needs_reduce(optimizer.policy, recipes),
        by_rows=any(r.clip.mode == ClipMode.AGC for r in recipes),
        pass_scopes=tuple(int(scope) for scope in optimizer.stage_scopes),
        select=select if selects else None,
        span=0 if select is None or selects else select[4],
        absorbs=optimizer.absorbs,
    )


def _form_of_recipe(recipe: Recipe) -> tuple[object, ...]:
    reads_first = bool(recipe.clip.mode) or recipe.accumulates
    return (*form_of(recipe), reads_first, _passes(recipe))


def _absorbed_for(recipe: Recipe) -> tuple[object, ...]:
    """What a pass that takes a gradient in is specialised for, of a recipe."""
    return (recipe.rule, recipe.low_states, recipe.param_storage, _passes(recipe))


def _passes(recipe: Recipe) -> tuple[object, ...]:
    """What passes before apply are specialised for, of the hyper-parameters."""
    rule = RULES[rule_for(recipe.rule, recipe.hyper)]
    if not rule.sources:
        return ()
    numbers = rule.sums(recipe.hyper), rule.reads_param(recipe.hyper), rule.draws(recipe.hyper)
    return (rule.name, *numbers)
