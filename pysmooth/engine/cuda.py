"""The engine of the CUDA backend: keeps a plan and its memory, and reads nothing back."""

from __future__ import annotations

import types
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import BackendError
from . import cuda_memory
from .amp import Amp
from .cuda_memory import PlanMemory, run_on_all, sites_of
from .cuda_spread import CudaSpread
from .device import Told, on_device
from .device_absorb import AbsorbingEngine
from .numbers import Numbers, form_of
from .recipe import ABSORBED, GRADIENT, ClipMode, ClipSpec, Policy, Recipe, needs_reduce
from .spread import Sums
from .state import version_roots

if TYPE_CHECKING:
    from .._cuda import Plan, RuleInfo
    from ..optim._base import FusedOptimizer

Hypers = list[tuple[float | Tensor, ...]]
Clips = list[ClipSpec]
TOP_K_OF_ALL = (1, 1)  # as csrc/core/step.h numbers Selector and SelectScope
NUMBERS = {
    "norms": torch.float64,
    "coefs": torch.float64,
    "skipped": torch.int64,
    "started": torch.int32,
    "spoiled": torch.int32,
    "taken": torch.int64,
    "torn": torch.int64,
}


class CudaEngine(AbsorbingEngine):
    """Steps through a plan of launches, made anew whenever anything but a gradient moved.

    The plan's memory, and what a step's numbers are written to, are torch tensors; launches go to
    torch's current stream. A step waits for nothing, but where it makes a plan. In the capture of a
    CUDA graph the numbers get memory of their own, so that replays and other steps do not disturb
    each other; the plan has to be there before: run the same step once.

    Parameters may lie on several GPUs: each has a memory of its own, the first parameter's first.
    """

    name = "cuda"

    def __init__(self, native: types.ModuleType) -> None:
        super().__init__()
        self._native = native
        self._rules: Mapping[str, RuleInfo] = {rule["name"]: rule for rule in native.rules()}
        self._plan: Plan | None = None
        self._built_for: tuple[object, ...] = ()
        self._devices = [torch.device("cpu")]
        self._memories: list[PlanMemory] = []
        self._given = Numbers([])
        self._numbers: dict[str, Tensor] = {}
        self._ran: tuple[Policy, list[Recipe]] | None = None  # the last step, if it took norms
        self._copied = False  # gradients, into new states, for the step to come
        self._state_dicts: list[dict[str, Any]] = []  # that the plan knows, per parameter
        self._spread: CudaSpread | None = None  # where parameters are parts of larger ones

    def attach(self, sums: Sums, jointly: bool) -> None:
        """Has the next steps' sums go over processes; `jointly`: top-k among all parts, too."""
        self._spread, self._built_for = CudaSpread(sums, jointly), ()

    # Not under torch.no_grad: that is for `_build` and `_run_on_all`. After a backward pass, when
    # caches hold nothing of it, it alone takes as long as all launches.
    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One fused step, enqueued."""
        recipes = optimizer.recipes()
        given = self._given
        if recipes is not given.recipes:
            late = any(self.reads(optimizer.late_lr(g)) for g in optimizer.param_groups)
            given = self._given = Numbers(recipes, late=late)
        if self._spread is not None and self._spread.look():
            self.settled(optimizer)
        if self._built_for != self._form(optimizer, given):
            self._build(optimizer, recipes, amp)
        try:
            if not self._enqueue(optimizer, given, amp):
                self._build(optimizer, recipes, amp)
                if not self._enqueue(optimizer, given, amp):
                    raise RuntimeError("parameters or states changed while the step was gathered")
        except BaseException:
            if not any(memory.captures() for memory in self._memories):
                self._settle_fresh(optimizer)
            raise
        self._ran = None if optimizer.absorbs else (optimizer.policy, recipes)
        if optimizer.absorbs:
            torch.autograd.graph.increment_version(self.forget_absorbed(optimizer))
        # Gradients that were copied into new states are kept only if the step happened, so that a
        # first step may have to wait.
        if self._copied or not cuda_memory.is_late(self._devices[0]):
            self._copied = False
            self.settled(optimizer)

    def _enqueue(self, optimizer: FusedOptimizer, given: Numbers, amp: Amp) -> bool:
        plan, memories = self._plan, self._memories
        assert plan is not None
        groups, state = optimizer.param_groups, optimizer.state
        few = not given.late and amp.found_inf is None and amp.scale is None
        if few and len(memories) == 1 and self._spread is None:
            memory = memories[0]
            if (stream := memory.ready()) is not None:
                numbers = (given.hypers, given.clips, None, None)
                return plan.step(groups, state, *numbers, memory.inputs_at, stream)
        return self._run_on_all(optimizer, given, amp)

    @torch.no_grad()
    def _run_on_all(self, optimizer: FusedOptimizer, given: Numbers, amp: Amp) -> bool:
        """The same on several devices, in captures, and with numbers that are on the device."""
        plan = self._plan
        assert plan is not None
        groups, state = optimizer.param_groups, optimizer.state
        numbers = [self._numbers_at(d, optimizer, given.recipes, amp) for d in self._devices]

        def keep() -> None:
            optimizer.keep_for_graphs(self._memories[0])
            self._fresh = {}  # a replay may use the states at any time

        def alone(inputs: int, stream: int) -> bool:
            return plan.step(groups, state, *numbers[0], inputs, stream)

        spread = self._spread
        if len(self._memories) == 1 and spread is None:
            return self._memories[0].launch(alone, keep)

        def launch(site: int, phase: int, inputs: int, stream: int) -> int:
            return plan.enqueue(site, phase, *numbers[site], inputs, stream)

        done = False
        try:
            if plan.begin(groups, state):
                run_on_all(
                    self._memories, launch, keep, spread.meet if spread is not None else None
                )
                done = True
        finally:
            plan.end(done)
        if done and spread is not None:
            spread.after()
        return done

    def _numbers_at(
        self, device: torch.device, optimizer: FusedOptimizer, recipes: list[Recipe], amp: Amp
    ) -> tuple[Hypers, Clips, Tensor | None, Tensor | None]:
        """A step's numbers, those on a device on this one."""
        return (
            [
                self._hyper(recipe, optimizer.late_lr(group), device)
                for recipe, group in zip(recipes, optimizer.param_groups, strict=True)
            ],
            [recipe.clip for recipe in recipes],
            on_device(device, amp.scale),
            on_device(device, amp.found_inf),
        )

    def reads(self, value: object) -> bool:
        """Whether kernels read this learning rate where it is: on the device."""
        return isinstance(value, Tensor) and cuda_memory.is_late(value.device)

    def _hyper(
        self, recipe: Recipe, lr: object, device: torch.device
    ) -> tuple[float | Tensor, ...]:
        if not isinstance(lr, Tensor) or not self.reads(lr):
            return recipe.hyper
        if cuda_memory.home(lr) not in self._devices or lr.dtype not in (
            torch.float32,
            torch.float64,
        ):
            raise ValueError(
                f"lr is a {lr.dtype} tensor on {lr.device}; the cuda backend reads float32 and "
                "float64 on the parameters' device, " + ", ".join(map(str, self._devices))
            )
        at = self._rules[recipe.rule]["hyper"].index("lr")
        here = lr.detach()
        if cuda_memory.home(lr) != device:
            here = here.to(device, non_blocking=True)
        return (*recipe.hyper[:at], here, *recipe.hyper[at + 1 :])

    # ---- plans ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _build(self, optimizer: FusedOptimizer, recipes: list[Recipe], amp: Amp) -> None:
        refuse_in_capture(torch.device(self._native.device_type))
        copies = any(recipe.initial(key) == GRADIENT for recipe in recipes for key in recipe.keys)
        scale = amp.read() if copies else 1.0
        members = self.gather(optimizer, recipes, 0.0 if scale is None else scale)
        sites, devices = sites_of(m.param for m in members)
        spread = self._spread
        state_dicts = [optimizer.state.get(m.param, {}) for m in members]
        absorbed = [state.get(ABSORBED, 0) for state in state_dicts]
        try:
            plan: Plan = self._native.Plan(
                params=[m.param for m in members],
                grads=[self.form_of(optimizer, m.param) for m in members],
                state=optimizer.state,
                state_dicts=state_dicts,
                state_keys=[m.recipe.keys for m in members],
                rules=[m.recipe.rule for m in members],
                groups=[m.group for m in members],
                names=[m.label for m in members],
                first=[m.begins for m in members],
                param_storage=[int(m.recipe.param_storage) for m in members],
                by_rows=[m.recipe.clip.mode == ClipMode.AGC for m in members],
                state_roots=version_roots([t for m in members for t in m.held.values()]),
                scope=int(optimizer.scope),
                policy=int(optimizer.policy),
                norm_type=optimizer.norm_type,
                stage_scopes=[int(scope) for scope in optimizer.stage_scopes],
                select=optimizer.select_spec(),
                absorbed=absorbed if optimizer.absorbs else [],
                sites=sites,
                parts=spread.parts([m.param for m in members]) if spread is not None else [],
                joins=spread is not None and spread.joins,
            )
            devices = devices or [torch.device("cpu")]
            memories = [PlanMemory(*pair) for pair in zip(plan.sites, devices, strict=True)]
            if optimizer.absorbs and devices[0].type == "cuda":
                torch.cuda.synchronize(devices[0])  # backward may work on another stream than this
        except BaseException:
            self.forget(optimizer, list(self._fresh))
            raise
        self._plan, self._memories, self._devices = plan, memories, devices
        self._numbers = {  # the same on all devices
            name: memories[0].plan[at : at + count * NUMBERS[name].itemsize].view(NUMBERS[name])
            for name, (at, count) in plan.sites[0].places.items()
        }
        self._state_dicts = state_dicts
        numbers = self._numbers
        self._told = Told(numbers["skipped"], numbers["spoiled"], numbers.get("taken"))
        if spread is not None:
            self._told = self._told._replace(torn=numbers["torn"], complain=spread.sums.complain)
            spread.use(plan, memories[0], numbers["torn"])
        self._copied = self.copies_gradients()
        self._built_for = self._form(optimizer, Numbers(recipes))

    # ---- gradients that states take in before the step ------------------------------------------

    def is_late(self, device: torch.device) -> bool:
        """Whether a device does its work behind the host's back."""
        return cuda_memory.is_late(device)

    def build(self, optimizer: FusedOptimizer) -> None:
        """Makes a plan for gradients to be taken in."""
        self._build(optimizer, optimizer.recipes(), Amp(None, None))

    def holds(self, optimizer: FusedOptimizer, place: int) -> bool:
        """Whether the plan is right for this parameter, its states and the gradient it has."""
        plan, member = self._plan, self._members[place]
        if plan is None or not self._built_for or len(optimizer.state) != self._built_for[0]:
            return False
        if optimizer.state.get(member.param) is not self._state_dicts[place]:
            return False
        recipe = optimizer.absorbing(optimizer.param_groups[member.group], first=True)
        known = form_of(recipe.of(member.param)) == form_of(member.recipe)
        return known and bool(member.held) and plan.holds(place)

    def take_in(self, optimizer: FusedOptimizer, place: int, recipe: Recipe, once: int) -> None:
        """Enqueues what takes the parameter's gradient in."""
        plan, memory = self._plan, self._memories[0]
        assert plan is not None
        lr = optimizer.late_lr(optimizer.param_groups[self._members[place].group])
        hyper = self._hyper(recipe, lr, memory.device)
        memory.enqueue(
            lambda stream: plan.absorb(place, hyper, recipe.clip, once, stream),
            lambda: optimizer.keep_for_graphs(memory),
        )

    # ---- what the host may ask for --------------------------------------------------------------

    def started(self) -> list[bool]:
        """Per parameter, whether a step of this plan has used its states. Waits for the device."""
        return [bool(flag) for flag in self._numbers["started"].tolist()]

    def outdate(self) -> None:
        """The next step makes a new plan; what this one has left can still be read."""
        self._built_for = ()

    def check_devices(self, optimizer: FusedOptimizer, devices: Sequence[torch.device]) -> None:
        """Takes several devices, but for what looks at all gradients as one list of values."""
        select = optimizer.select_spec()
        if len(devices) > 1 and self._spread is not None:
            self.refuse_devices("a step over several processes", devices)
        if len(devices) > 1 and optimizer.absorbs:
            self.refuse_devices("absorb=True", devices)
        if len(devices) > 1 and select is not None and select[:2] == TOP_K_OF_ALL:
            self.refuse_devices("TopK(scope='global')", devices)

    def lacks(self, recipe: Recipe) -> str | None:
        """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""
        return lacks(recipe, self._rules)

    def reads_grad(self, rule: str) -> bool:
        """False for rules that rewrite a single stream."""
        return bool(self._rules[rule]["reads_grad"])

    def _form(self, optimizer: FusedOptimizer, given: Numbers) -> tuple[object, ...]:
        """What a plan is built for, apart from tensors."""
        scope, policy, norm_type = optimizer.scope, optimizer.policy, optimizer.norm_type
        empty = self._spread.sums.empty_live if self._spread is not None else ()
        return len(optimizer.state), scope, policy, norm_type, given.forms, empty

    def _reduced(self) -> bool:
        return self._ran is not None and needs_reduce(*self._ran)

    def norms(self) -> Tensor | None:
        """Norms of the last step per scope unit; None if it took none."""
        return self._numbers["norms"].clone() if self._reduced() else None

    def coefs(self) -> Tensor | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        return self._numbers["coefs"].clone() if self._reduced() else None


def lacks(recipe: Recipe, rules: Container[str]) -> str | None:
    """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""
    return None if recipe.rule in rules else repr(recipe.rule)


def refuse_in_capture(device: torch.device) -> None:
    """A plan's memory has to outlive the capture that it is first used in."""
    if cuda_memory.stream_of(device)[1]:
        raise BackendError(
            "backend 'cuda' cannot prepare a step while a CUDA graph is captured; run the same "
            "step once before"
        )
