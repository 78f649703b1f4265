"""The engine of the Triton backend: keeps a plan alive, and reads nothing back from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._errors import BackendError
from ..triton_kernels.plan import Plan, Slot, group_words
from ..triton_kernels.rules import RULES
from ..triton_kernels.selection import MOST_BLOCK
from ..triton_kernels.specs import IN_BLOCK, Method
from .amp import Amp
from .device import DeviceEngine, Member, Told, gradient_of, on_device
from .recipe import (
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
from .state import version_roots

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer

Form = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]


class TritonEngine(DeviceEngine):
    """Steps through a `Plan`, rebuilt whenever anything but a gradient's address changed."""

    name = "triton"

    def __init__(self) -> None:
        super().__init__()
        self._plan: Plan | None = None
        self._built_for: tuple[object, ...] = ()
        self._states: list[list[tuple[str, Tensor, int]]] = []  # with their addresses
        self._addresses: list[int] = []
        self._forms: list[Form] = []
        self._roots: list[Tensor] = []
        self._selections = (0, 0)  # of plans that are gone

    @torch.no_grad()
    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One fused step: reduce where norms are needed, finalize, apply."""
        recipes = optimizer.recipes()
        plan = self._plan
        if plan is None or not self._fits(optimizer, recipes):
            plan = self._build(optimizer, recipes)
        grads = self._gradients()
        if grads is None:  # of another dtype or layout than before
            plan = self._build(optimizer, recipes)
            grads = self._gradients()
            assert grads is not None
        held = [on_device(plan.device, t) for t in amp]
        words = [
            word
            for recipe in recipes
            for word in group_words(recipe.hyper, recipe.clip, recipe.accumulates)
        ]
        scale, found_inf = (0 if t is None else t.data_ptr() for t in held)
        plan.run([address for _, address in grads], words, (scale, found_inf))
        written = [m.param for m, (g, _) in zip(self._members, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version([*written, *self._roots])
        if plan.device.type == "cpu":  # the interpreter: there is nothing to wait for
            self.settled(optimizer)

    # ---- what a step reads ---------------------------------------------------------------------

    def _fits(self, optimizer: FusedOptimizer, recipes: list[Recipe]) -> bool:
        """Whether the plan is of these parameters, and all is where it was."""
        if self._built_for != _form(optimizer, recipes):
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
            if (grad.dtype, grad.shape, grad.stride(), address % 16 == 0) != form:
                return None
            out.append((grad, address if grad.numel() > 0 else 0))
        return out

    # ---- plans ---------------------------------------------------------------------------------

    def _build(self, optimizer: FusedOptimizer, recipes: list[Recipe]) -> Plan:
        device = next((p.device.type for g in optimizer.param_groups for p in g["params"]), "cpu")
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "backend 'triton' cannot prepare a step while a CUDA graph is captured; run the "
                "same step once before"
            )
        _check_select(optimizer)
        selections = self.selections()
        members, place = self.gather(optimizer, recipes, None)
        try:
            grads = [gradient_of(m.param) for m in members]
            slots = [_slot(m, grad) for m, grad in zip(members, grads, strict=True)]
            plan = Plan(slots, len(recipes), _method(optimizer, recipes), place)
        except BaseException:
            self.forget(optimizer, list(self._fresh))
            raise
        self._plan, self._selections = plan, selections
        self._told = Told(plan.counters[:1], plan.spoiled)
        self._states = [[(k, t, t.data_ptr()) for k, t in m.held.items()] for m in members]
        self._forms = [(g.dtype, g.shape, g.stride(), g.data_ptr() % 16 == 0) for g in grads]
        self._addresses = [m.param.data_ptr() for m in members]
        self._roots = version_roots([t for m in members for t in m.held.values()])
        self._built_for = _form(optimizer, recipes)
        return plan

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
    if recipe.clip.mode == ClipMode.AGC:
        return "clip='agc'"
    if recipe.scales_blocks:
        return "scope='block' of QSGD"
    return None


def _check_select(optimizer: FusedOptimizer) -> None:
    """Blocks are selected from in registers, by one program each."""
    select = optimizer.select_spec()
    if select is not None and select[1] == IN_BLOCK and MOST_BLOCK % select[4] != 0:
        raise BackendError(
            f"block_size {select[4]} does not divide {MOST_BLOCK}: the triton backend does not "
            "take it"
        )


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _slot(member: Member, grad: Tensor) -> Slot:
    p, recipe, held = member.param, member.recipe, member.held
    fresh = 0 if p.numel() == 0 or not member.fresh else 2 - member.begins
    # A parameter without states has had no gradient: it is in the tables, and sits out.
    states = [_real(held[key] if held else p).detach() for key in recipe.states]
    low = sum(1 << i for i, key in enumerate(recipe.states) if held and key in recipe.low_states)
    numbers = (held.get(key) for key in (STEP, NORM_SQ, SCALE))
    starts = sum(1 << i for i, key in enumerate(recipe.states) if recipe.initial(key) == GRADIENT)
    companion = held.get(recipe.param_storage.companion or "")
    return Slot(
        *(recipe.rule, member.group, _real(p.detach()), _real(grad.detach()), states, *numbers),
        companion=companion,
        kept=int(recipe.param_storage) if held else int(ParamStorage.PLAIN),
        low=low,
        starts=starts,
        fresh=fresh,
        hyper=recipe.hyper,
    )


def _method(optimizer: FusedOptimizer, recipes: list[Recipe]) -> Method:
    return Method(
        scope=int(optimizer.scope),
        asks=optimizer.policy.asks_first,
        names=optimizer.policy == Policy.RAISE,
        zero=optimizer.policy == Policy.ZERO,
        norm_type=optimizer.norm_type,
        reduces=needs_reduce(optimizer.policy, recipes),
        pass_scopes=tuple(int(scope) for scope in optimizer.stage_scopes),
        select=optimizer.select_spec(),
    )


def _form(optimizer: FusedOptimizer, recipes: list[Recipe]) -> tuple[object, ...]:
    """What a plan is built for, apart from tensors."""
    return (
        len(optimizer.state),
        _method(optimizer, recipes),
        *((r.rule, r.low_states, r.param_storage, _passes(r)) for r in recipes),
    )


def _passes(recipe: Recipe) -> tuple[object, ...]:
    """What passes before apply are specialised for, of the hyper-parameters."""
    rule = RULES[recipe.rule]
    if not rule.sources:
        return ()
    return rule.sums(recipe.hyper), rule.reads_param(recipe.hyper), rule.draws(recipe.hyper)
