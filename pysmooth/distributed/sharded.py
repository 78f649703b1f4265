"""Steps over DTensors: the local parts go to a backend, sums go over the processes.

FSDP2 (`fully_shard`), HSDP and tensor parallelism all hand an optimizer DTensors. Their local parts
are ordinary tensors, and so are the states of the step; the optimizer shows states as DTensors with
the parameter's placement, so that torch.distributed.checkpoint saves and reshards them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .._errors import BackendError, NonFiniteGradientError
from ..engine.amp import Amp
from ..engine.recipe import ELSEWHERE, ClipMode
from .exchange import Exchange, Layout, Peers, is_shard, layout_of
from .sharded_view import View, is_dtensor, like

if TYPE_CHECKING:
    from ..optim._base import FusedOptimizer

Compress = Literal["per_shard", "global"]


@dataclass(frozen=True)
class Sharding:
    """What `set_sharding` was told."""

    process_group: Any = None
    compress: Compress | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self  # copies in one process talk over the same group

    def __reduce__(self) -> tuple[Any, ...]:
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with a process_group (pysmooth.distributed.set_sharding) cannot be "
                "pickled: a group is of this process. Save state_dict(), or pickle it after "
                "set_sharding without the group"
            )
        return (Sharding, (None, self.compress))


def set_sharding(
    optimizer: torch.optim.Optimizer,
    *,
    process_group: Any = None,
    compress: Compress | None = None,
) -> None:
    """Tells an optimizer what its parameters do not say about how a model is spread.

    DTensor parameters need no call of this: their norms are summed over exactly those mesh
    dimensions on which they are sharded.

    Copies of the optimizer (`copy.deepcopy`) keep it; pickling one refuses a process group.

    Args:
        optimizer: one of pysmooth's.
        process_group: over which the model's other parameters lie, such as the stages of a
            pipeline. Norms of scope "global" are those of all stages, those of scope "group" of the
            groups with the same place (every stage needs as many groups); a step is skipped in all
            stages or in none. Each tensor must be in one stage only.
        compress: how coordinates of sharded tensors are selected or rounded: "per_shard" takes
            each shard for a tensor of its own (top-k, rand-k, blocks, random rounding); "global"
            makes `TopK(scope="tensor")` select among all shards of a tensor, of equals those with
            the lowest global index. Without it such compressors refuse sharded tensors.

    Raises:
        TypeError: `optimizer` is not one of pysmooth's.
        ValueError: `compress` is something else.
    """
    from ..optim._base import FusedOptimizer
    from ..optim._validate import check_choice

    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer must be one of pysmooth's; got {type(optimizer)}")
    if compress is not None:
        check_choice("compress", compress, ("per_shard", "global"))
    optimizer.set_sharding(Sharding(process_group, compress))


def loaded_state(param: Any, own: Tensor, value: Any, key: str) -> Tensor:
    """A state of a DTensor parameter, in the memory `own`, from a value with any placement."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(value, DTensor):
        whole = [Replicate()] * param.device_mesh.ndim
        mesh = param.device_mesh
        value = DTensor.from_local(value.to(param.device), mesh, whole, run_check=False)
    if value.device_mesh != param.device_mesh:
        raise ValueError(f"state {key!r} in state_dict is a DTensor on another mesh")
    if value.placements != param.placements:
        value = value.redistribute(placements=param.placements)
    own.copy_(value.to_local())
    return like(param, own)


def refuse_flattened(params: Iterable[Tensor]) -> None:
    """Refuses shards that are plain tensors, whose norms would be local: those of FSDP1."""
    if any(getattr(p, "_fsdp_flattened", False) or hasattr(p, "_sharded_size") for p in params):
        raise ValueError(
            "pysmooth does not take parameters of FullyShardedDataParallel (FSDP1), whose shards "
            "are plain tensors: norms would be local. Use fully_shard (FSDP2)"
        )


class ShardedEngine:
    """Runs the CPU backend on local parts, with an `Exchange` between its passes."""

    exchange_type: type[Peers] = Exchange

    def __init__(self, inner: Any, sharding: Sharding) -> None:
        self.name = inner.name
        self._inner = inner
        self._sharding = sharding
        self._view: View | None = None
        self._exchange: Peers | None = None
        self._forms: tuple[object, ...] = ()

    def step(self, optimizer: FusedOptimizer, amp: Amp) -> None:
        """One fused step on all processes together."""
        view = self._ready(optimizer)
        assert self._exchange is not None
        self._exchange.live = view.pull()
        try:
            self._run(view, amp)
        finally:
            view.push()

    def _run(self, view: View, amp: Amp) -> None:
        exchange = cast("Exchange", self._exchange)
        if amp.found_inf is not None:
            exchange.same_overflow(float(amp.found_inf))
        try:
            self._inner.step(cast("FusedOptimizer", view), amp)
        except NonFiniteGradientError as error:
            names = ", ".join(repr(name) for name in exchange.flagged)
            where = names or ELSEWHERE
            raise NonFiniteGradientError(f"non-finite gradient in {where}") from error

    def _ready(self, optimizer: FusedOptimizer) -> View:
        recipes = optimizer.recipes()
        forms = tuple((r.rule, r.clip.mode) for r in recipes)
        if self._view is None or forms != self._forms or not self._view.of(optimizer):
            labels = optimizer.param_labels()
            params = [p for group in optimizer.param_groups for p in group["params"]]
            layouts = [
                layout_of(p, f"parameter {label!r}")
                for p, label in zip(params, labels, strict=True)
            ]
            for index, (group, recipe) in enumerate(
                zip(optimizer.param_groups, recipes, strict=True)
            ):
                first = sum(len(g["params"]) for g in optimizer.param_groups[:index])
                for i, p in enumerate(group["params"], first):
                    _check(optimizer, recipe, p, layouts[i], labels[i], self._sharding.compress)
            _check_alike(optimizer, layouts, labels)
            self._exchange = self.exchange_type(layouts, labels, self._sharding.process_group)
            self._view = View(optimizer)
            self._forms = forms
            self._inner.attach(self._exchange, self._sharding.compress == "global")
        return self._view

    def absorb(self, optimizer: FusedOptimizer, p: Tensor) -> bool:
        """Refused when hooks are made: gradients in backward are not final here."""
        raise BackendError("absorb=True does not go with DTensor parameters")

    def selections(self) -> tuple[int, int]:
        """How many selections there were so far, and how many needed a second look."""
        counts: tuple[int, int] = self._inner.selections()
        return counts

    def summed(self) -> int:
        """No sums are taken in backward here."""
        return 0

    def settle(self, optimizer: FusedOptimizer) -> int:
        """Skipped steps are counted as they happen."""
        return 0

    def norms(self) -> list[float] | Tensor | None:
        """Norms of the last step per scope unit; None if it took none."""
        norms: list[float] | Tensor | None = self._inner.norms()
        return norms

    def coefs(self) -> list[float] | Tensor | None:
        """Clip coefficients of the last step per parameter; None if it took no norms."""
        coefs: list[float] | Tensor | None = self._inner.coefs()
        return coefs


def _check(
    optimizer: FusedOptimizer,
    recipe: Any,
    p: Tensor,
    layout: Layout,
    label: str,
    compress: Compress | None,
) -> None:
    """Refuses what cannot be computed from parts, by name."""
    if not layout.groups:
        return
    name, what = type(optimizer).__name__, f"parameter {label!r}, which is sharded"
    if recipe.clip.mode == ClipMode.AGC:
        rows = p.dim() >= 2 and all(
            q.is_replicate() or (is_shard(q) and q.dim == 0) for q in cast(Any, p).placements
        )
        if not rows or recipe.accumulates:
            raise ValueError(
                f"clip='agc' needs whole rows, and does not go with {what}"
                f"{' within them' if not rows else ' under an accumulated norm'}"
            )
    if recipe.rule.startswith("clip21") and recipe.rule.endswith("_noise"):
        raise ValueError(f"{name} with noise_std does not go with {what}: shards would share noise")
    compressor = getattr(optimizer, "compressor", None)
    if compressor is None:
        return
    kind = type(compressor).__name__
    whole = kind in ("Identity", "ScaledSign", "HardThreshold") and compressor.scale_block is None
    if whole or compress == "per_shard":
        return
    if compress == "global" and kind == "TopK" and compressor.scope == "tensor":
        if not layout.in_order:
            raise ValueError(
                f"compress='global' selects where shards are cut along dimension 0 of one mesh "
                f"dimension; {what} otherwise, is not"
            )
        return
    choice = f"compress={compress!r} does not go" if compress else "does not go"
    raise ValueError(f"{name}: {kind} {choice} with {what}; see pysmooth.distributed.set_sharding")


def _check_alike(optimizer: FusedOptimizer, layouts: list[Layout], labels: list[str]) -> None:
    """Refuses to select among tensors that are not cut alike: replicas of some would part."""
    compressor = getattr(optimizer, "compressor", None)
    if compressor is None or compressor.select is None or compressor.scale_scope != "global":
        return
    cuts = [[dist.get_process_group_ranks(g) for g in layout.groups] for layout in layouts]
    for label, cut in zip(labels, cuts, strict=True):
        if cut != cuts[0]:
            raise ValueError(
                f"{type(optimizer).__name__}: {compressor!r} selects among all parameters, which "
                f"have to be sharded alike; {label!r} is not as {labels[0]!r}"
            )


def sharding_of(optimizer: FusedOptimizer) -> Sharding | None:
    """How parameters are spread over processes; None if they are not.

    Raises:
        ValueError: FSDP1 holds the parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    refuse_flattened(params)
    if optimizer.sharding is None and any(map(is_dtensor, params)):
        return Sharding()
    return optimizer.sharding
