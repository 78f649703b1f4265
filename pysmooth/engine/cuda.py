"""The engine of the CUDA backend: keeps a plan and its memory, and reads nothing back."""

from __future__ import annotations

import types
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import BackendError
from .amp import Amp
from .backends import native_module
from .device import Told, on_device
from .device_absorb import AbsorbingEngine
from .recipe import ABSORBED, GRADIENT, ClipMode, Recipe, needs_reduce
from .state import version_roots

if TYPE_CHECKING:
    from .._cpu import StateSnapshot
    from .._cuda import ClipPlan, Plan, RuleInfo
    from ..optim._base import FusedOptimizer

NUMBERS = {
    "norms": torch.float64,
    "coefs": torch.float64,
    "skipped": torch.int64,
    "started": torch.int32,
    "spoiled": torch.int32,
    "taken": torch.int64,
}


class PlanMemory:
    """A plan's memory on a device, and the stream that launches on it went to last.

    Attributes:
        plan: what kernels leave to each other, and to the host.
        captured: whether graphs hold launches on it.
    """

    def __init__(self, plan: Plan | ClipPlan, device: torch.device) -> None:
        self._device, self.captured = device, False
        self.plan = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
        self._inputs = torch.empty(plan.input_bytes, dtype=torch.uint8, device=device)
        with _current(device):
            self._stream, _ = _stream(device)
            plan.upload(self.plan.data_ptr(), self._stream)

    def is_free(self) -> bool:
        """Whether a launch now keeps its distance from others: as it is on their stream.

        Replays go to any stream. What a graph has is for captures alone from then on.
        """
        with _current(self._device):
            stream, captures = _stream(self._device)
        return captures or (stream == self._stream and not self.captured)

    def launch(self, run: Callable[[int, int], bool], keep: Callable[[], None]) -> bool:
        """What run(address of the step's inputs, stream) says.

        keep() is called in the capture of a graph, which needs the memory from then on.
        """
        with _current(self._device):
            stream, captures = self._use(keep)
            # Part of the graph's own memory, as everything that is allocated in a capture.
            inputs = torch.empty_like(self._inputs) if captures else self._inputs
            return run(inputs.data_ptr(), stream)

    def enqueue(self, run: Callable[[int], None], keep: Callable[[], None]) -> None:
        """run(stream), of what brings its numbers along; keep as above."""
        with _current(self._device):
            run(self._use(keep)[0])

    def _use(self, keep: Callable[[], None]) -> tuple[int, bool]:
        stream, captures = _stream(self._device)
        if captures:
            self.captured = True
            keep()
            return stream, True
        if stream != self._stream and self.plan.is_cuda:
            for memory in (self.plan, self._inputs):
                memory.record_stream(torch.cuda.current_stream(self._device))
        self._stream = stream
        return stream, False


class CudaEngine(AbsorbingEngine):
    """Steps through a plan of launches, made anew whenever anything but a gradient moved.

    The plan's memory, and what a step's numbers are written to, are torch tensors; launches go to
    torch's current stream. A step waits for nothing, but where it makes a plan. In the capture of a
    CUDA graph the numbers get memory of their own, so that replays and other steps do not disturb
    each other; the plan has to be there before: run the same step once.
    """

    name = "cuda"

    def __init__(self, native: types.ModuleType) -> None:
        super().__init__()
        self._native = native
        self._rules: Mapping[str, RuleInfo] = {rule["name"]: rule for rule in native.rules()}
        self._plan: Plan | None = None
        self._built_for: tuple[object, ...] = ()
        self._states: StateSnapshot | None = None
        self._device = torch.device("cpu")
        self._memory: PlanMemory | None = None
        self._numbers: dict[str, Tensor] = {}
        self._reduces = False
        self._copied = False  # gradients, into new states, for the step to come
        self._state_dicts: list[dict[str, Any]] = []  # that the plan knows, per parameter

    @torch.no_grad()
    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One fused step, enqueued."""
        recipes = optimizer.recipes()
        known = self._states is not None and self._states.same(optimizer.state)
        if self._plan is None or not known or self._built_for != _form(optimizer, recipes):
            self._build(optimizer, recipes, amp)
        try:
            if not self._enqueue(optimizer, recipes, amp):
                self._build(optimizer, recipes, amp)
                if not self._enqueue(optimizer, recipes, amp):
                    raise RuntimeError("parameters or states changed while the step was gathered")
        except BaseException:
            if not _stream(self._device)[1]:
                self._settle_fresh(optimizer)
            raise
        self._reduces = not optimizer.absorbs and needs_reduce(optimizer.policy, recipes)
        if optimizer.absorbs:
            torch.autograd.graph.increment_version(self.forget_absorbed(optimizer))
        # Gradients that were copied into new states are kept only if the step happened, so that a
        # first step may have to wait.
        if self._copied or not _is_late(self._device):
            self._copied = False
            self.settled(optimizer)

    def _enqueue(self, optimizer: FusedOptimizer, recipes: list[Recipe], amp: Amp) -> bool:
        plan, memory = self._plan, self._memory
        assert plan is not None
        assert memory is not None
        numbers = (
            [group["params"] for group in optimizer.param_groups],
            [
                self._hyper(recipe, optimizer.late_lr(group))
                for recipe, group in zip(recipes, optimizer.param_groups, strict=True)
            ],
            [recipe.clip for recipe in recipes],
            on_device(self._device, amp.scale),
            on_device(self._device, amp.found_inf),
        )

        def launch(inputs: int, stream: int) -> bool:
            return plan.step(*numbers, inputs, stream)

        def keep() -> None:
            optimizer.keep_for_graphs(memory)
            self._fresh = {}  # a replay may use the states at any time

        return memory.launch(launch, keep)

    def reads(self, value: object) -> bool:
        """Whether kernels read this learning rate where it is: on the device."""
        return isinstance(value, Tensor) and _is_late(value.device)

    def _hyper(self, recipe: Recipe, lr: object) -> tuple[float | Tensor, ...]:
        if not isinstance(lr, Tensor) or not self.reads(lr):
            return recipe.hyper
        if lr.device != self._device or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"lr is a {lr.dtype} tensor on {lr.device}; the cuda backend reads float32 and "
                f"float64 on the parameters' device, {self._device}"
            )
        at = self._rules[recipe.rule]["hyper"].index("lr")
        return (*recipe.hyper[:at], lr.detach(), *recipe.hyper[at + 1 :])

    # ---- plans ---------------------------------------------------------------------------------

    def _build(self, optimizer: FusedOptimizer, recipes: list[Recipe], amp: Amp) -> None:
        refuse_in_capture(torch.device(self._native.device_type))
        copies = any(recipe.initial(key) == GRADIENT for recipe in recipes for key in recipe.keys)
        scale = amp.read() if copies else 1.0
        members, device = self.gather(optimizer, recipes, 0.0 if scale is None else scale)
        state_dicts = [optimizer.state.get(m.param, {}) for m in members]
        absorbed = [state.get(ABSORBED, 0) for state in state_dicts]
        try:
            plan: Plan = self._native.Plan(
                params=[m.param for m in members],
                grads=[self.form_of(optimizer, m.param) for m in members],
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
            )
            memory = PlanMemory(plan, device)
            if optimizer.absorbs and device.type == "cuda":
                torch.cuda.synchronize(device)  # backward may work on another stream than this
        except BaseException:
            self.forget(optimizer, list(self._fresh))
            raise
        self._plan, self._memory, self._device = plan, memory, device
        self._numbers = {
            name: memory.plan[at : at + count * NUMBERS[name].itemsize].view(NUMBERS[name])
            for name, (at, count) in plan.places.items()
        }
        self._state_dicts = state_dicts
        self._told = Told(
            self._numbers["skipped"], self._numbers["spoiled"], self._numbers.get("taken")
        )
        self._copied = self.copies_gradients()
        self._built_for = _form(optimizer, recipes)
        self._states = native_module().StateSnapshot(optimizer.state)

    # ---- gradients that states take in before the step ------------------------------------------

    def is_late(self, device: torch.device) -> bool:
        """Whether a device does its work behind the host's back."""
        return _is_late(device)

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
        known = _form_of(recipe.of(member.param)) == _form_of(member.recipe)
        return known and bool(member.held) and plan.holds(place)

    def take_in(self, optimizer: FusedOptimizer, place: int, recipe: Recipe, once: int) -> None:
        """Enqueues what takes the parameter's gradient in."""
        plan, memory = self._plan, self._memory
        assert plan is not None
        assert memory is not None
        lr = optimizer.late_lr(optimizer.param_groups[self._members[place].group])
        hyper = self._hyper(recipe, lr)
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

    def lacks(self, recipe: Recipe) -> str | None:
        """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""
        return lacks(recipe, self._rules)

    def reads_grad(self, rule: str) -> bool:
        """False for rules that rewrite a single stream."""
        return bool(self._rules[rule]["reads_grad"])

    def norms(self) -> Tensor | None:
        """Norms of the last step per scope unit; None if it took none."""
        return self._numbers["norms"].clone() if self._reduces else None

    def coefs(self) -> Tensor | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        return self._numbers["coefs"].clone() if self._reduces else None


def lacks(recipe: Recipe, rules: Container[str]) -> str | None:
    """What the recipe asks for and this backend has no kernel for, in words; None: nothing."""
    return None if recipe.rule in rules else repr(recipe.rule)


def refuse_in_capture(device: torch.device) -> None:
    """A plan's memory has to outlive the capture that it is first used in."""
    if _stream(device)[1]:
        raise BackendError(
            "backend 'cuda' cannot prepare a step while a CUDA graph is captured; run the same "
            "step once before"
        )


def _is_late(device: torch.device) -> bool:
    """Whether a device does its work behind the host's back: the emulation does not."""
    return device.type == "cuda"


def _stream(device: torch.device) -> tuple[int, bool]:
    """The stream to launch on, and whether a CUDA graph is captured on it."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that launches go to."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def _form(optimizer: FusedOptimizer, recipes: list[Recipe]) -> tuple[object, ...]:
    """What a plan is built for, apart from tensors."""
    settings = (optimizer.scope, optimizer.policy, optimizer.norm_type)
    return (len(optimizer.state), settings, *map(_form_of, recipes))


def _form_of(recipe: Recipe) -> tuple[object, ...]:
    return (
        recipe.rule,
        recipe.low_states,
        recipe.param_storage,
        recipe.clip.mode == ClipMode.AGC,
    )
