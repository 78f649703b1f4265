"""The engine of the Triton backend: keeps a plan alive, and reads nothing back from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import BackendError, NonFiniteGradientError
from ..triton_kernels.how import STORED
from ..triton_kernels.plan import Plan, Slot, group_words
from ..triton_kernels.rules import RULES
from ..triton_kernels.selection import MOST_BLOCK
from ..triton_kernels.specs import IN_BLOCK, Method
from .amp import Amp
from .checks import check_gradient, check_layout, check_memory, check_state
from .recipe import (
    GRADIENT,
    NORM_SQ,
    SCALE,
    STEP,
    ClipMode,
    ParamStorage,
    Policy,
    Recipe,
    Scope,
    needs_reduce,
)
from .state import fill_state, new_states, version_roots

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer

Form = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]


class TritonEngine:
    """Steps through a `Plan`, rebuilt whenever anything but a gradient's address changed."""

    name = "triton"

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._built_for: tuple[object, ...] = ()
        self._params: list[Tensor] = []
        self._states: list[list[tuple[str, Tensor, int]]] = []  # with their addresses
        self._addresses: list[int] = []
        self._forms: list[Form] = []
        self._roots: list[Tensor] = []
        # Parameters whose states were allocated, and may yet have had no step; with what their
        # state dict held before, None where there was none.
        self._fresh: dict[Tensor, dict[str, Any] | None] = {}
        self._begins: set[Tensor] = set()  # those of them whose rule has had no step
        self._selections = (0, 0)  # of plans that are gone
        self._stateless: set[Tensor] = set()  # parameters that have had no gradient yet

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
        held = [_on(plan.device, t) for t in amp]
        words = [
            word
            for recipe in recipes
            for word in group_words(recipe.hyper, recipe.clip, recipe.accumulates)
        ]
        scale, found_inf = (0 if t is None else t.data_ptr() for t in held)
        plan.run([address for _, address in grads], words, (scale, found_inf))
        written = [p for p, (g, _) in zip(self._params, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version([*written, *self._roots])
        if plan.device.type == "cpu":  # the interpreter: there is nothing to wait for
            for _ in range(self.settle(optimizer)):
                optimizer.count_skipped()

    # ---- what a step reads ---------------------------------------------------------------------

    def _fits(self, optimizer: FusedOptimizer, recipes: list[Recipe]) -> bool:
        """Whether the plan is of these parameters, and all is where it was."""
        if self._built_for != _form(optimizer, recipes):
            return False
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if len(params) != len(self._params):
            return False
        for p, known, address, states in zip(
            params, self._params, self._addresses, self._states, strict=True
        ):
            if p is not known or p.data_ptr() != address:
                return False
            state = optimizer.state.get(p, {}) if states else {}
            for key, tensor, place in states:
                if state.get(key) is not tensor or tensor.data_ptr() != place:
                    return False
            if p in self._stateless and p.grad is not None:
                return False
        return True

    def _gradients(self) -> list[tuple[Tensor | None, int]] | None:
        """Every parameter's gradient and its address, 0 for none; None if a form changed."""
        out: list[tuple[Tensor | None, int]] = []
        for p, form in zip(self._params, self._forms, strict=True):
            grad = p.grad
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
        self._settle_fresh(optimizer)
        self._selections = self.selections()
        self._plan = None
        try:
            return self._plan_of(optimizer, recipes)
        except BaseException:
            self._forget(optimizer, list(self._fresh))
            raise

    def _plan_of(self, optimizer: FusedOptimizer, recipes: list[Recipe]) -> Plan:
        groups, params = [], []
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                groups.append(index)
                params.append(p)
        labels = optimizer.param_labels()
        mine = [recipes[g].of(p) for g, p in zip(groups, params, strict=True)]
        device = _one_device(params)
        _check_select(optimizer)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "backend 'triton' cannot prepare a step while a CUDA graph is captured; run the "
                "same step once before"
            )
        for p, label, recipe in zip(params, labels, mine, strict=True):
            self._check(optimizer, p, label, recipe)
        self._allocate(optimizer, params, mine)
        slots = []
        written = []
        self._states, self._forms, self._stateless = [], [], set()
        for p, label, recipe, g in zip(params, labels, mine, groups, strict=True):
            state = optimizer.state.get(p, {})
            has = all(state.get(key) is not None for key in recipe.keys)
            held = [(key, state[key]) for key in recipe.keys] if has else []
            if not has:
                self._stateless.add(p)
            self._states.append([(key, t, t.data_ptr()) for key, t in held])
            written += [(f"parameter {label!r}", p)]
            written += [(f"state {key!r} of parameter {label!r}", t) for key, t in held]
            grad = p if p.grad is None else p.grad.resolve_conj().resolve_neg()
            self._forms.append((grad.dtype, grad.shape, grad.stride(), grad.data_ptr() % 16 == 0))
            fresh = 0 if p.numel() == 0 or p not in self._fresh else 2 - (p in self._begins)
            slots.append(_slot(p, grad, dict(held), recipe, g, fresh))
        check_memory(written)
        self._plan = Plan(slots, len(recipes), _method(optimizer, recipes), device)
        self._params, self._addresses = params, [p.data_ptr() for p in params]
        self._roots = version_roots([t for held in self._states for _, t, _ in held])
        self._built_for = _form(optimizer, recipes)
        return self._plan

    def _check(self, optimizer: FusedOptimizer, p: Tensor, label: str, recipe: Recipe) -> None:
        """Refuses what a kernel could not do right, naming it."""
        name = f"parameter {label!r}"
        if (missing := lacks(recipe)) is not None:
            raise BackendError(f"the triton backend has no kernel for {missing}")
        check_layout(p, name)
        if p.is_conj() or p.is_neg():
            raise ValueError(f"{name} has its conjugate or negative bit set; pass a resolved copy")
        if p.numel() > 0 and p.data_ptr() == 0:
            raise BackendError(f"{name} has no memory of its own that the triton backend could use")
        check_gradient(p, label)
        kinds = [_real_dtype(t.dtype) for t in (p, p.grad) if t is not None]
        for kind in kinds:
            if kind not in STORED:
                raise BackendError(
                    f"{name} has dtype {kind}, which the triton backend does not take"
                )
        if len(kinds) == 2 and not _takes(*kinds, reads_grad=RULES[recipe.rule].reads_grad):
            raise BackendError(
                f"gradient of parameter {label!r} has dtype {kinds[1]} and its parameter "
                f"{kinds[0]}, a pair that the triton backend does not take"
            )
        if p.grad is not None and p.grad.device != p.device:
            raise BackendError(f"gradient of parameter {label!r} is on {p.grad.device}")
        state = optimizer.state.get(p, {})
        for key in recipe.keys:
            if state.get(key) is not None:
                check_state(p, label, key, state[key], recipe)

    def _allocate(
        self, optimizer: FusedOptimizer, params: list[Tensor], recipes: list[Recipe]
    ) -> None:
        """Gives the parameters that have a gradient the states they lack, filled."""
        lacking = []
        veterans = {}
        for p, recipe in zip(params, recipes, strict=True):
            known = optimizer.state.get(p)
            missing = [k for k in recipe.keys if known is None or known.get(k) is None]
            if missing and p.grad is not None:
                self._fresh[p] = None if known is None else dict(known)
                if any(key in recipe.rule_keys for key in missing):
                    self._begins.add(p)
                lacking += [(p, key, recipe) for key in missing]
        group_of = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        if optimizer.scope != Scope.TENSOR:
            for p in params:
                held = optimizer.state.get(p, {}).get(NORM_SQ)
                if held is not None and p not in self._fresh:
                    veterans[group_of[p]] = held
        for (p, key, recipe), state in zip(lacking, new_states(lacking), strict=True):
            # One that joins takes the accumulated norm from one of its group that was there.
            if key == NORM_SQ and group_of[p] in veterans:
                state.copy_(veterans[group_of[p]])
            else:
                # The gradient, if that is what it starts from, is filled in by the first pass: it
                # knows if the step happens.
                start = recipe.initial(key)
                fill_state(state, 0.0 if start == GRADIENT else start, p, 1.0)
            optimizer.state[p][key] = state
        for p, recipe in zip(params, recipes, strict=True):
            # Counted on the device: the host does not know if a step happened.
            steps = optimizer.state.get(p, {}).get(STEP) if recipe.keeps_step else None
            if steps is not None and steps.device != p.device:
                optimizer.state[p][STEP] = steps.to(p.device)

    # ---- what the host may ask for ---------------------------------------------------------------

    def settle(self, optimizer: FusedOptimizer) -> int:
        """Reads how many steps were skipped since it was last asked. Waits for the device.

        Raises:
            NonFiniteGradientError: for the policy "raise", if there was one.
        """
        plan = self._plan
        if plan is None:
            return 0
        skipped = int(plan.counters[0])
        self._settle_fresh(optimizer)
        if not skipped:
            return 0
        plan.counters.zero_()
        if optimizer.policy == Policy.RAISE:
            spoiled = plan.spoiled.tolist()
            plan.spoiled.zero_()
            labels = zip(optimizer.param_labels(), spoiled, strict=False)  # groups may have joined
            names = ", ".join(repr(label) for label, bad in labels if bad)
            raise NonFiniteGradientError(f"non-finite gradient in {names}")
        return skipped

    def _settle_fresh(self, optimizer: FusedOptimizer) -> None:
        """Forgets states that were allocated for steps which then did not happen."""
        if self._fresh and self._plan is not None:
            flags = zip(self._params, self._plan.fresh.tolist(), strict=False)
            unused = [p for p, fresh in flags if fresh]
            if unused:  # empty ones never have a step of their own
                unused += [p for p in self._fresh if p.numel() == 0]
            self._forget(optimizer, unused)

    def _forget(self, optimizer: FusedOptimizer, unused: list[Tensor]) -> None:
        for p in unused:
            before = self._fresh[p]
            state = optimizer.state.pop(p, {})
            if before is not None:
                state.clear()
                state.update(before)
                optimizer.state[p] = state
            self._built_for = ()  # the next step builds a plan
        self._fresh, self._begins = {}, set()

    def summed(self) -> int:
        """No sums are taken in backward here."""
        return 0

    def norms(self) -> Tensor | None:
        """Norms of the last step per scope unit; None if it took none."""
        plan = self._plan
        return None if plan is None or not plan.method.reduces else plan.norms.clone()

    def coefs(self) -> Tensor | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        plan = self._plan
        return None if plan is None or not plan.method.reduces else plan.coefs.clone()

    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Refused: no kernel takes a gradient in by itself yet."""
        raise BackendError("the triton backend has no kernel for absorb=True")

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


def _one_device(params: list[Tensor]) -> torch.device:
    devices = {p.device for p in params}
    if len(devices) > 1:
        raise BackendError(
            "backend 'triton' takes parameters of one device; these are on "
            + ", ".join(sorted(map(str, devices)))
        )
    return devices.pop() if devices else torch.device("cpu")


def _on(device: torch.device, t: Tensor | None) -> Tensor | None:
    """A number where the kernels can read it, in float32."""
    return None if t is None else t.detach().to(device, torch.float32, non_blocking=True)


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _takes(param: torch.dtype, grad: torch.dtype, *, reads_grad: bool) -> bool:
    """The pairs of dtypes that people train with, as in csrc/cpu/kernels.h."""
    if param == grad or not reads_grad:
        return param == grad
    return grad == torch.float32 or (param == torch.float32 and grad != torch.float64)


def _slot(
    p: Tensor, grad: Tensor, held: dict[str, Tensor], recipe: Recipe, group: int, fresh: int
) -> Slot:
    # A parameter without states has had no gradient: it is in the tables, and sits out.
    states = [_real(held[key] if held else p).detach() for key in recipe.states]
    low = sum(1 << i for i, key in enumerate(recipe.states) if held and key in recipe.low_states)
    numbers = (held.get(key) for key in (STEP, NORM_SQ, SCALE))
    starts = sum(1 << i for i, key in enumerate(recipe.states) if recipe.initial(key) == GRADIENT)
    companion = held.get(recipe.param_storage.companion or "")
    return Slot(
        *(recipe.rule, group, _real(p.detach()), _real(grad.detach()), states, *numbers),
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
