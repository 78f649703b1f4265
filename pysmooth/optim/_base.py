"""The base class of the optimizers: everything about torch.optim that is not a method's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from ..engine.amp import NO_AMP, Amp
from ..engine.backends import Backend, Engine, make_engine, native_module, resolve
from ..engine.device import DeviceEngine
from ..engine.recipe import (
    ClipMode,
    ParamStorage,
    Policy,
    Recipe,
    Scope,
    needs_reduce,
)
from ..engine.state import fill_state
from ._hooks import GradientHooks
from ._known import KeepsRecipes
from ._loading import Load
from ._managed import refuse_managed, refuse_zero
from ._names import TAKES_NAMES, set_names
from ._precision import check_param_storage, param_storage
from ._told import TellsOfSteps
from ._validate import check_choice, check_number

if TYPE_CHECKING:
    from ..distributed.sharded import Sharding

_SCOPES = {"global": Scope.GLOBAL, "group": Scope.GROUP, "tensor": Scope.TENSOR}
_NORMS = ("in_step", "in_backward")
_AMP = ("fused", "external")
# Stands for a learning rate that kernels read on their device: asking for its value would wait.
_UNREAD = float("nan")
_POLICIES = {
    "propagate": Policy.PROPAGATE,
    "skip": Policy.SKIP,
    "raise": Policy.RAISE,
    "zero": Policy.ZERO,
}


def check_scope(scope: str) -> Scope:
    """The scope of that name."""
    return _SCOPES[check_choice("scope", scope, _SCOPES)]


class FusedOptimizer(KeepsRecipes, TellsOfSteps, torch.optim.Optimizer):
    """A torch optimizer whose step is a recipe, run by the engine of a backend.

    A subclass gives `recipe(group)`, which turns one parameter group into numbers, and
    `check_group(group)`, which refuses bad hyper-parameters.
    """

    scope: Scope
    policy: Policy
    norm_type: float
    # Over what the passes before apply sum up; see csrc/core/rule.h.
    stage_scopes: tuple[Scope, ...] = ()
    # Whether GradScaler.unscale_ changed the gradients of this step, which torch keeps no count of.
    unscaled_by_scaler = False
    # torch.amp.GradScaler then sets `grad_scale` and `found_inf` before a step, and deletes them
    # after it: the step divides gradients by the one, unless that is None because they are unscaled
    # already, and does not happen if the other is not 0. It does so for those who say this.
    _step_supports_amp_scaling = True
    # Whether kernels may read a group's lr where it is, on their device.
    lr_on_device = True
    # Whether hooks take gradients into states, and free them; see `EFSGD`.
    absorbs = False
    # States of a parameter that a subclass keeps beside those of its recipe.
    own_states: tuple[str, ...] = ()
    # What the parameters do not say about how a model is spread over processes.
    sharding: Sharding | None = None
    policies: tuple[str, ...] = ("propagate", "skip", "raise")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        scope: str,
        nonfinite: str,
        norm_type: float,
        backend: str,
        norm: str = "in_step",
        master_weights: bool = False,
        kahan: bool = False,
        stochastic_rounding: bool = False,
        amp: str = "fused",
    ) -> None:
        refuse_zero()
        self.scope = check_scope(scope)
        self.policy = _POLICIES[check_choice("nonfinite", nonfinite, self.policies)]
        self.norm_type = check_number("norm_type", norm_type, strict=True, infinite=True)
        self._step_supports_amp_scaling = check_choice("amp", amp, _AMP) == "fused"
        self._backend = backend
        self._engine: Engine | None = None
        self._skipped = 0
        self._norm_in_backward = False
        self._hooks: GradientHooks | None = None
        resolve(backend, ())  # refuse an unknown or missing backend before anything is set up
        precision = {
            "master_weights": master_weights,
            "kahan": kahan,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, {**defaults, **precision})
        self.take_norms(norm)

    # ---- what a subclass provides --------------------------------------------------------------

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The step of one parameter group, as numbers. Called for every group in every step."""
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError, naming the argument, for a group that makes no sense."""
        raise NotImplementedError

    def absorbing(self, group: dict[str, Any], *, first: bool) -> Recipe:
        """For optimizers that absorb: what is done with a step's first gradient, or the others."""
        raise NotImplementedError

    def absorb_rest(self) -> bool:
        """For optimizers that absorb: takes in what backward did not; False to skip the step."""
        raise NotImplementedError

    def select_spec(self) -> tuple[int, int, float, int, int, bool, int] | None:
        """How coordinates are selected, for rules that do: numbers as in csrc/cpu/select.h."""
        return None

    def _made(self, group: dict[str, Any]) -> Recipe:
        return self._recipe(self._readable(group))

    def _readable(self, group: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self._engine, DeviceEngine) and self._engine.reads(self.late_lr(group)):
            return {**group, "lr": _UNREAD}
        return group

    def late_lr(self, group: dict[str, Any]) -> object:
        """The learning rate, if kernels may read it where it is."""
        return group.get("lr") if self.lr_on_device else None

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        recipe, storage = self.recipe(group), param_storage(group)
        clip = recipe.clip
        rest = clip.eps + clip.l0 + clip.l1 + clip.value
        if not math.isfinite(sum(recipe.hyper) + rest) or math.isnan(clip.max_norm):
            # It would spoil states for good. This names the argument, if it is one.
            self._check({**group, "lr": 1.0} if group.get("lr") is _UNREAD else group)
        return recipe if storage == ParamStorage.PLAIN else recipe._replace(param_storage=storage)

    def _check(self, group: dict[str, Any]) -> None:
        self.check_group(group)
        check_param_storage(group)

    # ---- torch.optim.Optimizer -----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; refuses bad values before anything changes."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = {**self.defaults, **param_group}
        if not isinstance(group.get("params"), Tensor | set):  # torch's own words for a set
            group["params"] = list(group["params"])
            if not TAKES_NAMES:
                set_names(group)
        self._check(group)
        count = len(self.param_groups)
        super().add_param_group(group)
        try:
            self._resolve()
        except Exception:
            del self.param_groups[count:]
            raise
        self._reset()
        if count > 0:  # else the constructor does it, when all groups are there
            self.follow_params()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The loss, if a closure was given.

        Raises:
            NonFiniteGradientError: a gradient is not finite and the policy is "raise".
            ValueError, TypeError: a gradient is sparse, or has a shape, dtype or device that the
                backend does not take. Parameters and states are as they were.
        """
        # torch wraps every optimizer's step in a profiler range and in hooks, at the price of a
        # small model's whole step. The same wrapper runs here, but only for those who look.
        watched = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        )
        if watched and type(self).step is FusedOptimizer.step:  # else torch wrapped the subclass's
            return _watched_step(self) if closure is None else _watched_step(self, closure)
        return self._step(closure)

    # Tells torch that hooks and profiler are taken care of.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Dynamo, when it compiles this, takes the first question for true; and where it is not
        # there, it need not be kept out, which would cost the step of a small model a tenth.
        if is_dynamo_compiling() or _dynamo() is not None:
            self._run_uncompiled()
        else:
            self._run()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_uncompiled(self) -> None:
        self._run()

    def _run(self) -> None:
        held = self.__dict__  # where GradScaler puts them
        amp = NO_AMP
        if "found_inf" in held or "grad_scale" in held:
            amp = Amp(held.get("grad_scale"), held.get("found_inf"))
        if self.absorbs and amp != NO_AMP:
            raise RuntimeError(
                "absorb=True does not go with GradScaler: gradients were absorbed as they came, "
                "scaled. The residual is not usable any more"
            )
        engine = self._engine or self._ready_engine()
        if self._hooks is not None and self._hooks.lacking:
            self.follow_params()
        self.unscaled_by_scaler = amp.found_inf is not None and amp.scale is None
        if self.absorbs and not self.absorb_rest():
            return
        engine.step(self, amp)

    def use_backend(self, backend: Backend) -> None:
        """Has the next steps run by another backend, with the states as they are.

        Raises:
            BackendError: it is not there, or has no kernel for what the groups ask.
        """
        before, self._backend = self._backend, backend
        try:
            self._resolve()
        except BaseException:
            self._backend = before
            raise
        self._reset()

    def set_sharding(self, sharding: Sharding) -> None:
        """What `pysmooth.distributed.set_sharding` calls."""
        self.sharding = sharding
        self._reset()

    def _resolve(self) -> str:
        """The backend for what the groups are now."""
        own: dict[Recipe, None] = {}
        for group in self.param_groups:
            recipe = self._recipe(group)
            own |= dict.fromkeys([recipe.of(p) for p in group["params"]] or [recipe])
        return resolve(self._backend, self._params(), own, self.absorbs)

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            name, sharding = self._resolve(), None
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                from ..distributed.sharded import sharding_of

                sharding = sharding_of(self)
            self._engine = make_engine(name, sharding)
        return self._engine

    # ---- what can be read after a step ---------------------------------------------------------

    @property
    def resolved_backend(self) -> str:
        """The backend that runs the steps, never "auto"."""
        return self._resolve()

    def keep_for_graphs(self, memory: object) -> None:
        """Called by an engine in a capture: replays use this after the engine has let it go."""
        kept = self.__dict__.setdefault("_kept_for_graphs", [])
        if all(known is not memory for known in kept):
            kept.append(memory)

    @torch.no_grad()
    def sync_master_weights(self) -> None:
        """Takes 16-bit parameters as they are now.

        With `master_weights` or `kahan` a step starts from the states that go with a parameter,
        which know nothing of values that somebody else wrote to it: after `p.copy_(...)` or
        `model.load_state_dict(...)` call this. Equivalent to::

            state[p]["master_param"] = p.float()        # master_weights
            state[p]["compensation"] = zeros_like(p)    # kahan
        """
        for group, recipe in zip(self.param_groups, self.recipes(), strict=True):
            key = recipe.param_storage.companion
            for p in group["params"]:
                held = self.state.get(p, {}).get(key)
                if key in recipe.of(p).keys and held is not None:
                    fill_state(held, recipe.initial(key), p, 1.0)

    def _settle(self) -> None:
        # A backend that does not wait for its device may have something left to tell.
        if (engine := getattr(self, "_engine", None)) is not None:  # none yet while unpickling
            self._skipped += engine.settle(self)

    def param_labels(self) -> list[str]:
        """Each parameter's name, for messages: its own (`named_parameters()`), else its place."""
        labels: list[str] = []
        for index, group in enumerate(self.param_groups):
            count = len(group["params"])
            names = group.get("param_names", ())
            known = len(names) == count  # a list of parameters that was edited outgrew its names
            labels += names if known else [f"group {index}, parameter {i}" for i in range(count)]
        return labels

    # ---- hooks in backward ---------------------------------------------------------------------

    def take_norms(self, norm: str) -> None:
        """Decides where gradients are read for their norms: "in_step" or "in_backward"."""
        if self._hooks is not None:
            self._hooks.follow(())
        self._norm_in_backward = check_choice("norm", norm, _NORMS) == "in_backward"
        recipes = self.recipes()
        if self._norm_in_backward and any(r.clip.mode == ClipMode.AGC for r in recipes):
            raise ValueError(
                "norm='in_backward' does not go with clip='agc', which needs row norms"
            )
        if self._norm_in_backward and not needs_reduce(self.policy, recipes):
            raise ValueError(
                "norm='in_backward' has nothing to do: no group needs a norm. Set max_norm "
                "(infinity takes the norm, and clips nothing), or nonfinite to 'skip' or 'raise'"
            )
        self.follow_params()

    def follow_params(self) -> None:
        """Puts the hooks on the parameters that the groups hold now."""
        if not self._norm_in_backward:
            return
        params = self._params()
        refuse_managed(params, "norm='in_backward'")
        if self._resolve() != "cpu":
            return  # the others take their norms in the step
        if self._hooks is None:
            self._hooks = GradientHooks(self, partial(native_module().BackwardSums, self.norm_type))
        self._hooks.follow(params)

    def backward_sums(self, param: Tensor) -> Any:
        """The hook that takes the parameter's sums, or None."""
        return self._hooks.of(param) if self._hooks and self._norm_in_backward else None

    def hooks_held(self) -> int:
        """How many parameters have a hook."""
        return 0 if self._hooks is None else len(self._hooks)

    # ---- saving and loading --------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def state_dict(self) -> dict[str, Any]:
        """As in torch. With nonfinite="raise", raises what a device has not told yet."""
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold addresses: a copy makes its own.
        self._settle()
        state: dict[str, Any] = dict(super().__getstate__())
        fused = (self.scope, self.policy, self.norm_type, self._backend, self._skipped)
        state["_norm_in_backward"] = self._norm_in_backward
        state["_step_supports_amp_scaling"] = self._step_supports_amp_scaling
        state["absorbs"] = self.absorbs
        state["sharding"] = self.sharding
        state["_passes"] = (self.stage_scopes, getattr(self, "compressor", None))
        state["_fused"] = fused
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this for unpickling, with everything, and for loading, with groups and states.
        state = dict(state)
        if "_fused" in state:
            fused = state.pop("_fused")
            self.scope, self.policy, self.norm_type, self._backend, self._skipped = fused
            self.stage_scopes, compressor = state.pop("_passes")
            if compressor is not None:
                self.compressor = compressor
            self._hooks = None  # those of a copy's parameters are made here
        self._reset()
        super().__setstate__(state)
        self.follow_params()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, pysmooth's or the torch twin's.

        States keep the precision that pysmooth holds them in (torch's own loading casts them to the
        parameter's dtype). Hyper-parameters that the loaded groups lack keep their present values.

        Raises:
            ValueError: groups or shapes do not match, something is not what torch puts there.
            TypeError: a hyper-parameter has the wrong type.

        After an error, or without memory for the states, the optimizer is as it was.
        """
        load = Load(self)
        # The last of the pre-hooks sees what will really be loaded; the first of the post-hooks
        # completes the load before the user's hooks look at it.
        pre = self.register_load_state_dict_pre_hook(load.capture)
        post = self.register_load_state_dict_post_hook(load.restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            pre.remove()
            post.remove()

    # ---- internals -----------------------------------------------------------------------------

    def _reset(self) -> None:
        """Forgets what was derived from the groups; the next step rebuilds it."""
        self._settle()
        self._engine = None
        self._known = None


def _no_dynamo_known() -> object:
    return True  # it has to be kept out in any case


# What torch.compile has hooked into this thread's calls of Python functions; None: nothing.
_dynamo: Callable[[], object] = getattr(
    getattr(torch._C._dynamo, "eval_frame", None), "get_eval_frame_callback", _no_dynamo_known
)
_watched_step = torch.optim.Optimizer.profile_hook_step(FusedOptimizer._step)
