"""Clipped SGD whose threshold and step size come from the theory of convex (L0,L1)-smoothness."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..engine.backends import Backend
from ..engine.checks import check_memory
from ..engine.recipe import COMPENSATION, MASTER
from ..engine.state import empty_states, state_dtype
from ._clip import NonFinite
from ._host_step import HostStepOptimizer, norm_of
from ._precision import Precision
from ._validate import check_choice, check_flag, check_number

Rule = Literal["standard", "implicit", "adaptive"]
# What the accumulator of the adaptive rule starts from.
START = 1e-3


class TheoryClipSGD(HostStepOptimizer):
    r"""Clipped SGD with the step rules of Gaash, Levy and Carmon: `ClipSGD.from_theory`.

    With c = max(10 L0, sqrt(T) sigma / R0) / L1, and h the norm of a second, independent sample::

        alpha = min(1, c / h)
        "standard":  step_size = min(1 / (11 L0), 1 / (L0 + sqrt(T) sigma / R0)) * alpha
        "implicit":  step_size = 1 / (L0 + L1 h + sqrt(T) sigma / R0)
        "adaptive":  G = G + (alpha * norm(g))**2       # from 1e-3
                     step_size = R0 / sqrt(G) * alpha
        p = p - lr * step_size * g

    With `double_sampling` h comes from gradients that are no part of the step::

        loss(second_batch).backward(); optimizer.take_sample(); optimizer.zero_grad()
        loss(batch).backward(); optimizer.step()

    Without it h is the norm of g itself: "standard" is then `ClipSGD(lr * eta, max_norm=c,
    clip_eps=0)`, "implicit" `ClipSGD.from_smoothness`, "adaptive" `AdagradNorm`. The step reads
    gradients once for a norm, and once to move.

    The theory's result is the mean of the points whose step was not clipped (h <= c), the first
    point if there is none: `average=True` keeps it, `averaged()` gives it.

    State: none; with `average` `average`, 4 bytes per parameter (float32 also for 16-bit
    parameters), 8 for float64.

    Args:
        params: as in `pysmooth.ClipSGD`.
        L0: smoothness at stationary points, greater than 0.
        L1: growth of the smoothness with the gradient's norm, greater than 0.
        sigma: the noise's standard deviation, sqrt(E\|\|noise\|\|^2), at least 0.
        R0: distance to the solution, greater than 0.
        T: how many gradients will be taken altogether, with both samples counted.
        rule: as above.
        lr: the "const" in front of the step.
        double_sampling: whether h is an independent sample's norm.
        average: whether the mean is kept.
        scope: "global", or "group" for independent runs.
        maximize: ascend instead of descend.
        nonfinite, backend, precision: as in `pysmooth.ClipSGD`; `amp` is "external".

    Raises:
        ValueError: an argument is out of range, or a step lacks its second sample.
        TypeError: an argument has the wrong type.
        BackendError: the backend is not available for these parameters.

    Source: arXiv:2502.16492, step rules as in its authors' code.
    """

    # Of no recipe: the step does not touch it.
    own_states = ("average",)
    memory = {"sum_squares": START, "sample_norm": None, "averaged": 0}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        L0: float,
        L1: float,
        *,
        sigma: float,
        R0: float,
        T: int,
        rule: Rule = "standard",
        lr: float | Tensor = 1.0,
        double_sampling: bool = True,
        average: bool = False,
        scope: str = "global",
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
        backend: Backend = "auto",
        **precision: Unpack[Precision],
    ) -> None:
        defaults = {"lr": lr, "L0": L0, "L1": L1, "sigma": sigma, "R0": R0, "T": T, "rule": rule}
        defaults |= {"double_sampling": double_sampling, "average": average}
        super().__init__(
            params,
            defaults,
            scope=scope,
            maximize=maximize,
            nonfinite=nonfinite,
            backend=backend,
            **precision,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses values that make no sense, naming the argument."""
        super().check_group(group)
        for name in ("L0", "L1", "R0", "T"):
            check_number(name, group[name], strict=True)
        check_number("sigma", group["sigma"])
        check_choice("rule", group["rule"], ("standard", "implicit", "adaptive"))
        for name in ("double_sampling", "average"):
            check_flag(name, group[name])

    @staticmethod
    def constants(group: dict[str, Any]) -> tuple[float, float, float]:
        """(c, eta, noise): threshold, step size of "standard", sqrt(T) sigma / R0."""
        noise = math.sqrt(group["T"]) * group["sigma"] / group["R0"]
        eta = min(1 / (11 * group["L0"]), 1 / (group["L0"] + noise))
        return max(10 * group["L0"], noise) / group["L1"], eta, noise

    @torch.no_grad()
    def take_sample(self) -> None:
        """Takes the norms of the present gradients for the clip of the next step."""
        for groups in self.units():
            norm = norm_of(self.gradients(groups))
            for group in groups:
                group["sample_norm"] = norm

    def choose(self, groups: list[dict[str, Any]], unit: int) -> dict[str, Any]:
        """The rule's step size."""
        g = groups[0]
        c, eta, noise = self.constants(g)
        h = g["sample_norm"]
        if g["double_sampling"] and h is None:
            raise ValueError("the step has no second sample: call take_sample() before it")
        if not g["double_sampling"]:
            h = norm_of(self.gradients(groups))
        alpha = c / h if h > c else 1.0 + 0.0 * h
        out: dict[str, Any] = {"sample_norm": None}
        if g["rule"] == "implicit":
            out["step_size"] = 1 / (g["L0"] + g["L1"] * h + noise)
        elif g["rule"] == "standard":
            out["step_size"] = eta * alpha
        else:
            own = norm_of(self.gradients(groups)) if g["double_sampling"] else h
            out["sum_squares"] = g["sum_squares"] + (alpha * own) ** 2
            out["step_size"] = g["R0"] / math.sqrt(out["sum_squares"]) * alpha
        if g["average"]:
            out["averaged"] = max(map(self._counted, groups)) + (1 if h <= c else 0)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        counts = [self._counted(group) for group in self.param_groups]
        points = {
            p: self._point(p)
            for group in self.param_groups
            for p in group["params"]
            if group["average"] and p.grad is not None
        }
        self._check_means(points)
        skipped = self._skipped
        super()._run()
        if self._skipped != skipped:
            return
        for group, count in zip(self.param_groups, counts, strict=True):
            for p in group["params"]:
                if p in points:
                    mean = self.state[p].setdefault("average", points[p])
                    if group["averaged"] > count:
                        mean.lerp_(points[p], 1 / group["averaged"])

    def _check_means(self, points: dict[Tensor, Tensor]) -> None:
        """The means can be written, and hold nothing else: a step that fails changes nothing."""
        labels = dict(zip(self._params(), self.param_labels(), strict=True))
        written: list[tuple[str, Tensor]] = []
        for p, point in points.items():
            mean = self.state.get(p, {}).get("average", point)
            name = f"state 'average' of parameter {labels[p]!r}"
            if not isinstance(mean, Tensor):
                raise TypeError(f"{name} is not a tensor but {type(mean)}")
            if (mean.shape, mean.dtype, mean.device) != (point.shape, point.dtype, point.device):
                raise ValueError(
                    f"{name} is {mean.dtype} of shape {tuple(mean.shape)} on {mean.device}, "
                    f"expected {point.dtype} of shape {tuple(point.shape)} on {point.device}"
                )
            written += [(name, mean), (f"parameter {labels[p]!r}", p.detach())]
        check_memory(written)

    def _counted(self, group: dict[str, Any]) -> int:
        """Of how many points the group's mean is: of none where the states were taken away."""
        kept = any("average" in self.state.get(p, {}) for p in group["params"])
        return int(group["averaged"]) if kept else 0

    def _point(self, p: Tensor) -> Tensor:
        """Where the parameter is, its companion counted in, in the dtype of states."""
        state = self.state.get(p, {})
        (point,) = empty_states([(p, state_dtype(p))])
        point.copy_(state.get(MASTER, p.detach()))
        return point.add_(state[COMPENSATION]) if COMPENSATION in state else point

    def averaged(self) -> list[Tensor]:
        """The mean of the points whose step was not clipped; needs `average=True`."""
        if not all(group["average"] for group in self.param_groups):
            raise ValueError("average=False: nothing was kept")
        return [self.state.get(p, {}).get("average", p.detach()).clone() for p in self._params()]
