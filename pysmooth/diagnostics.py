"""Is a problem (L0,L1)-smooth, is its gradient noise heavy-tailed: estimates from a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._extras import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a normal sample, the parts beyond Q3 + 1.5 and Q3 + 3 interquartile ranges.
_MILD, _EXTREME = 0.0035, 1.2e-6


class Smoothness(NamedTuple):
    """Local smoothness along a run, and its fit L0 + L1 * norm by least squares.

    Attributes:
        L0: where the fit meets norm 0, at least 0; in units of curvature.
        L1: its slope, at least 0: by how much curvature grows with the gradient's norm.
        norms: of the gradient, before each step that moved.
        local: smoothness between the ends of each of these steps.
    """

    L0: float
    L1: float
    norms: Tensor
    local: Tensor


class Tail(NamedTuple):
    """The tail of a sample of norms.

    Attributes:
        tail_index: Hill's estimate of alpha in P(norm > t) ~ t^-alpha.
        mild: the share beyond Q3 + 1.5 interquartile ranges, over that of a normal sample.
        extreme: the same beyond Q3 + 3.
    """

    tail_index: float
    mild: float
    extreme: float


def estimate_smoothness(points: Sequence[Tensor], gradients: Sequence[Tensor]) -> Smoothness:
    r"""Local smoothness \|\|g' - g\|\| / \|\|x' - x\|\| of consecutive points, fitted to \|\|g\|\|.

    A lower estimate: smoothness is a largest value, and a run sees only its own direction. Take
    gradients of the whole data, or of one batch: the noise of batches would pass for curvature.

    Args:
        points: of a run, one tensor each, at least three.
        gradients: at these points.

    Raises:
        ValueError: shapes differ, too few points have moved, or something is not finite.

    Source: arXiv:1905.11881, which plots the same two quantities.
    """
    if len(points) != len(gradients) or len(points) < 3:
        raise ValueError("points and gradients must be as many, and at least three")
    if any(x.shape != g.shape for x, g in zip(points, gradients, strict=True)):
        raise ValueError("points and gradients must have the same shapes")
    x = torch.stack([p.detach().double().flatten() for p in points])
    g = torch.stack([p.detach().double().flatten() for p in gradients])
    if not bool(x.isfinite().all() and g.isfinite().all()):
        raise ValueError("points and gradients must be finite")
    moved = x.diff(dim=0).norm(dim=1)
    local, norms = g.diff(dim=0).norm(dim=1)[moved > 0], g[:-1].norm(dim=1)[moved > 0]
    local = local / moved[moved > 0]
    if len(local) < 2:
        raise ValueError("fewer than two steps moved")
    spread = norms - norms.mean()
    square = float((spread**2).sum())
    slope = max(0.0, float((spread * local).sum()) / square) if square > 0 else 0.0
    level = float(local.mean()) - slope * float(norms.mean())
    if level < 0:  # the best fit through the origin
        level, slope = 0.0, float((norms * local).sum() / (norms**2).sum())
    return Smoothness(level, slope, norms, local)


def plot_smoothness(found: Smoothness, axes: Axes | None = None) -> Axes:
    r"""Draws local smoothness against \|\|g\|\|, step by step, and the fitted line.

    Points along a rising line: (L0,L1)-smooth, and L1 is its slope. A level cloud: smooth, L1 = 0.
    Points are coloured by their place in the run, the first dark.

    Args:
        found: of `estimate_smoothness`.
        axes: where to draw; None: a figure of its own, `axes.figure`, which no window shows.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed: pip install 'pysmooth[bench]'.

    Source: arXiv:1905.11881, figure 1.
    """
    if axes is None:
        figure: Any = needs("matplotlib.figure", extra="bench").Figure(figsize=(5, 3.6))
        axes = figure.subplots()
    norms, local = found.norms.cpu(), found.local.cpu()
    axes.scatter(norms, local, c=range(len(norms)), s=14, cmap="viridis", label="steps of the run")
    ends = torch.linspace(0, float(norms.max()), 2, dtype=norms.dtype)
    label = f"{found.L0:.3g} + {found.L1:.3g} ||g||"
    axes.plot(ends, found.L0 + found.L1 * ends, color="tab:red", linewidth=1.3, label=label)
    axes.set_xlabel("norm of the gradient, ||g||")
    axes.set_ylabel("local smoothness")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return axes


def estimate_tail(norms: Tensor, *, part: float = 0.1) -> Tail:
    """Tail of the norms of gradient noise: an index below 2 has no variance.

    Args:
        norms: of gradients minus their mean, at least 20 of them.
        part: of the sample, its largest values, that Hill's estimate takes; in (0, 1).

    Raises:
        ValueError: too few norms, or one that is negative or not finite.

    Source: the two ratios, arXiv:2406.04443.
    """
    values = norms.detach().double().flatten()
    if not 0 < part < 1:
        raise ValueError(f"part must be in (0, 1); got {part}")
    if len(values) < 20 or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError("norms must be at least 20 finite numbers of at least 0")
    ordered = values.sort(descending=True).values
    k = max(2, math.ceil(part * len(ordered)))
    if float(ordered[k]) == 0:
        raise ValueError("norms must be greater than 0 in the tail")
    mean = float((ordered[:k] / ordered[k]).log().mean())
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    beyond = [float((values > high + c * (high - low)).double().mean()) for c in (1.5, 3.0)]
    return Tail(1 / mean if mean > 0 else math.inf, beyond[0] / _MILD, beyond[1] / _EXTREME)
