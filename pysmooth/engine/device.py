"""What engines have in common whose kernels run on a device, while the host goes on.

Nothing is read back in a step: the host learns from `settle` what became of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._errors import BackendError, NonFiniteGradientError
from . import cuda_memory
from .backends import Engine
from .checks import check_gradient, check_layout, check_memory, check_state
from .recipe import ABSORBED, ELSEWHERE, GRADIENT, NORM_SQ, STEP, Policy, Recipe, Scope
from .state import fill_state, new_states

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer

TAKEN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Member(NamedTuple):
    """One parameter, with what a plan is made of."""

    param: Tensor
    label: str
    group: int
    recipe: Recipe
    held: dict[str, Tensor]  # its states; none if it never had a gradient
    fresh: bool  # some of them were allocated for the step to come
    begins: bool  # some of the rule's own among these


class Told(NamedTuple):
    """What the device keeps for the host to read, beside the plan."""

    skipped: Tensor  # how many steps the policy refused; one number
    spoiled: Tensor  # per parameter: not 0 if its gradient was not finite
    taken: Tensor | None = None  # per parameter: gradients that its states took in since a step
    # Where parameters are parts of larger ones: not 0 after a step that processes did not agree
    # about. One number, and what raises an error for it.
    torn: Tensor | None = None
    complain: Callable[[int], None] | None = None


class DeviceEngine(Engine):
    """Checks, states and answers. A subclass has the plan, and runs the step."""

    name: str

    def __init__(self) -> None:
        self._told: Told | None = None
        self._members: list[Member] = []
        self._places: dict[Tensor, int] = {}  # parameters' numbers
        # Parameters whose states were allocated, and may yet have had no step; with what their
        # state dict held before, None where there was none.
        self._fresh: dict[Tensor, dict[str, Any] | None] = {}

    # ---- what a subclass provides --------------------------------------------------------------

    @abstractmethod
    def lacks(self, recipe: Recipe) -> str | None:
        """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""

    def reads(self, value: object) -> bool:
        """Whether kernels read this learning rate where it is: on the device."""
        return False

    @abstractmethod
    def reads_grad(self, rule: str) -> bool:
        """False for rules that rewrite a single stream."""

    @abstractmethod
    def started(self) -> list[bool]:
        """Per parameter, whether a step of this plan has used its states. Waits for the device."""

    @abstractmethod
    def outdate(self) -> None:
        """The next step makes a new plan; what this one has left can still be read."""

    # ---- making plans --------------------------------------------------------------------------

    def gather(
        self, optimizer: FusedOptimizer, recipes: list[Recipe], scale: float | None
    ) -> list[Member]:
        """All parameters, checked, those that have a gradient with states. Waits for the device.

        `scale` is what gradients are multiplied by where they are copied into states; None: the
        kernels do that, into states that are 0.
        """
        self.settled(optimizer)
        self.outdate()
        groups, params = [], []
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                groups.append(index)
                params.append(p)
        labels = optimizer.param_labels()
        mine = [recipes[g].of(p) for g, p in zip(groups, params, strict=True)]
        self.check_devices(optimizer, sorted({cuda_memory.home(p) for p in params}, key=str))
        for p, label, recipe in zip(params, labels, mine, strict=True):
            self._check(optimizer, p, label, recipe)
        try:
            self._allocate(optimizer, params, mine, scale)
            members, written = [], []
            for p, label, recipe, g in zip(params, labels, mine, groups, strict=True):
                state = optimizer.state.get(p, {})
                has = all(state.get(key) is not None for key in recipe.keys)
                held = {key: state[key] for key in recipe.keys} if has else {}
                fresh = p in self._fresh
                before = self._fresh.get(p) or {}
                begins = fresh and any(before.get(key) is None for key in recipe.rule_keys)
                members.append(Member(p, label, g, recipe, held, fresh, begins))
                written.append((f"parameter {label!r}", p))
                written += [(f"state {key!r} of parameter {label!r}", t) for key, t in held.items()]
            check_memory(written)
        except BaseException:
            self.forget(optimizer, list(self._fresh))
            raise
        self._members = members
        self._places = {m.param: i for i, m in enumerate(members)}
        return members

    def check_devices(self, optimizer: FusedOptimizer, devices: Sequence[torch.device]) -> None:
        """Refuses parameters of several devices, where a step cannot take them."""
        if len(devices) > 1:
            self.refuse_devices(f"backend {self.name!r}", devices)

    def refuse_devices(self, what: str, devices: Sequence[torch.device]) -> None:
        """Says who takes one device only."""
        raise BackendError(
            f"{what} takes parameters of one device; these are on " + ", ".join(map(str, devices))
        )

    def _check(self, optimizer: FusedOptimizer, p: Tensor, label: str, recipe: Recipe) -> None:
        """Refuses what a kernel could not do right, naming it."""
        name = f"parameter {label!r}"
        if (missing := self.lacks(recipe)) is not None:
            raise BackendError(f"the {self.name} backend has no kernel for {missing}")
        check_layout(p, name)
        if p.is_conj() or p.is_neg():
            raise ValueError(f"{name} has its conjugate or negative bit set; pass a resolved copy")
        if p.numel() > 0 and p.data_ptr() == 0:
            raise BackendError(
                f"{name} has no memory of its own that the {self.name} backend could use"
            )
        check_gradient(p, label)
        kinds = [real_dtype(t.dtype) for t in (p, p.grad) if t is not None]
        for kind in kinds:
            if kind not in TAKEN:
                raise BackendError(
                    f"{name} has dtype {kind}, which the {self.name} backend does not take"
                )
        if len(kinds) == 2 and not takes_pair(*kinds, reads_grad=self.reads_grad(recipe.rule)):
            raise BackendError(
                f"gradient of parameter {label!r} has dtype {kinds[1]} and its parameter "
                f"{kinds[0]}, a pair that the {self.name} backend does not take"
            )
        if p.grad is not None and p.grad.device != p.device:
            raise BackendError(f"gradient of parameter {label!r} is on {p.grad.device}")
        state = optimizer.state.get(p, {})
        for key in recipe.keys:
            if state.get(key) is not None:
                check_state(p, label, key, state[key], recipe)

    def _allocate(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        recipes: list[Recipe],
        scale: float | None,
    ) -> None:
        """Gives the parameters that have a gradient the states they lack, filled."""
        lacking = []
        for p, recipe in zip(params, recipes, strict=True):
            known = optimizer.state.get(p)
            missing = [k for k in recipe.keys if known is None or known.get(k) is None]
            # Where gradients are absorbed, nobody can ask later who has one.
            if missing and (p.grad is not None or (optimizer.absorbs and p.requires_grad)):
                self._fresh[p] = None if known is None else dict(known)
                lacking += [(p, key, recipe) for key in missing]
        group_of = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        veterans = {}
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
                start = recipe.initial(key)
                if start == GRADIENT and scale is None:
                    start = 0.0
                sign = -1.0 if recipe.clip.maximize else 1.0
                fill_state(state, start, p, sign * (scale or 0.0))
            optimizer.state[p][key] = state
        for p, recipe in zip(params, recipes, strict=True):
            # Counted on the device: the host does not know if a step happened.
            steps = optimizer.state.get(p, {}).get(STEP) if recipe.keeps_step else None
            if steps is not None and steps.device != p.device:
                optimizer.state[p][STEP] = steps.to(p.device)

    def copies_gradients(self) -> bool:
        """Whether a gradient, finite or not, was copied into states for the step to come."""
        return any(
            m.fresh and any(m.recipe.initial(key) == GRADIENT for key in m.recipe.keys)
            for m in self._members
        )

    # ---- what the host may ask for -------------------------------------------------------------

    def settle(self, optimizer: FusedOptimizer) -> int:
        """Reads how many steps were skipped since it was last asked. Waits for the device.

        Raises:
            NonFiniteGradientError: for the policy "raise", if there was one.
        """
        if (told := self._told) is None:
            return 0
        skipped = int(told.skipped)
        if told.taken is not None:
            self._settle_absorbed(optimizer, told.taken)
        self._settle_fresh(optimizer)
        if told.torn is not None and told.complain is not None and (torn := int(told.torn)):
            told.torn.zero_()
            told.complain(torn)
        if not skipped:
            return 0
        told.skipped.zero_()
        if optimizer.policy == Policy.RAISE:
            spoiled = told.spoiled.tolist()
            told.spoiled.zero_()
            labels = (m.label for m, bad in zip(self._members, spoiled, strict=True) if bad)
            where = ", ".join(repr(label) for label in labels) or ELSEWHERE
            raise NonFiniteGradientError(f"non-finite gradient in {where}")
        return skipped

    def settled(self, optimizer: FusedOptimizer) -> None:
        """Before a plan goes: what it still has to tell."""
        for _ in range(self.settle(optimizer)):
            optimizer.count_skipped()

    def _settle_fresh(self, optimizer: FusedOptimizer) -> None:
        """Forgets states that were allocated for steps which then did not happen."""
        if not self._fresh or self._told is None:
            return
        used = {m.param for m, flag in zip(self._members, self.started(), strict=True) if flag}
        parts = self._told.torn is not None  # of which empty ones count, too
        unused = [p for p in self._fresh if (p.numel() > 0 or parts) and p not in used]
        # Else empty ones have no step of their own: they go where others go.
        if unused and not parts:
            unused += [p for p in self._fresh if p.numel() == 0]
        self.forget(optimizer, unused)

    def _settle_absorbed(self, optimizer: FusedOptimizer, taken: Tensor) -> None:
        """What the device has counted: more than the host saw in replays, less where it refused."""
        for member, count in zip(self._members, taken.tolist(), strict=True):
            held = optimizer.state.get(member.param, {})
            if count or held.get(ABSORBED):
                held[ABSORBED] = count

    def forget(self, optimizer: FusedOptimizer, unused: Iterable[Tensor]) -> None:
        """Takes away states that were allocated in vain."""
        for p in unused:
            before = self._fresh[p]
            state = optimizer.state.pop(p, {})
            if before is not None:
                state.clear()
                state.update(before)
                optimizer.state[p] = state
            self.outdate()
        self._fresh = {}

    def summed(self) -> int:
        """No sums are taken in backward here."""
        return 0

    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Refused, unless a subclass can (device_absorb.py)."""
        raise BackendError(f"the {self.name} backend has no kernel for absorb=True")

    def selections(self) -> tuple[int, int]:
        """Not counted here."""
        return (0, 0)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a complex number's parts."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def takes_pair(param: torch.dtype, grad: torch.dtype, *, reads_grad: bool) -> bool:
    """The pairs of dtypes that people train with, as in csrc/cpu/kernels.h."""
    if param == grad or not reads_grad:
        return param == grad
    return grad == torch.float32 or (param == torch.float32 and grad != torch.float64)


def on_device(device: torch.device, t: Tensor | None) -> Tensor | None:
    """A number where kernels can read it, in float32."""
    return None if t is None else t.detach().to(device, torch.float32, non_blocking=True)


def gradient_of(p: Tensor) -> Tensor:
    """The gradient, or what it will look like."""
    return p if p.grad is None else p.grad.resolve_conj().resolve_neg()
