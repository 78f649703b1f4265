"""Specs: all that is ever compiled is made here, from rules, dtypes and layouts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl

from . import tuning
from .absorb import admit, look
from .apply import apply
from .block_scales import block_scales
from .finalize import finalize, finish_pass
from .how import STOCHASTIC, STORED, How
from .launch import Spec
from .reduce import reduce
from .rows import row_coefs, row_sums
from .rule import GRAD, NOTHING, PARAM, STATE, Rule, Streams
from .source import source
from .table import CHUNK

SQUARES, ABS, MAX, POWER = 0, 1, 2, 5
GLOBAL, GROUP, TENSOR, BLOCK = range(4)
NO_SELECTION, TOP_K, RAND_K = range(3)
# Over what is selected. Values as in csrc/core/step.h.
IN_TENSOR, IN_ALL, IN_BLOCK = range(3)


@dataclass(frozen=True)
class Method:
    """What a step is, apart from its tensors."""

    scope: int
    asks: bool  # it has to know first if all gradients are finite
    names: bool  # and remembers whose were not
    zero: bool  # what is not finite counts as 0
    norm_type: float
    reduces: bool  # norms are taken
    pass_scopes: tuple[int, ...] = ()  # over what each pass before apply sums up
    by_rows: bool = False  # some clip has a coefficient per row
    select: tuple[Any, ...] | None = None  # as compressors say it
    span: int = 0  # elements that share a compressor's scale; 0: all of a unit
    absorbs: bool = False  # gradients are taken in before the step, one by one
    parts: bool = False  # tensors may be parts of larger ones

    @property
    def kind(self) -> int:
        """What the partial sums are of."""
        return {2.0: SQUARES, 1.0: ABS, float("inf"): MAX}.get(self.norm_type, POWER)


@dataclass(frozen=True)
class Form:
    """What passes over a tensor are specialised for.

    Attributes:
        dtypes: of the parameter, the gradient, the states, what goes with the parameter.
        dims, aligned: see How.
        low: states in bfloat16, as bits.
        kept: how the parameter is kept, as in csrc/core/param_storage.h.
        starts: states that start as the gradient, as bits.
        wide: its values are compared with float64 ones.
        listed: candidates are collected in lists: it does not fit into one program.
        span, rows, absorbed: see How.
    """

    dtypes: tuple[torch.dtype, ...]
    dims: int = 0
    aligned: bool = True
    low: int = 0
    kept: int = 0
    starts: int = 0
    wide: bool = False
    listed: bool = False
    span: int = 0
    rows: bool = False
    absorbed: bool = False

    def how(self, rule: Rule, function: Any, streams: Streams, zero: bool, **rest: Any) -> How:
        """A pass with these streams."""
        wide = max(d.itemsize for d in self.dtypes) == 8
        shape = tuning.shape_for(len(self.dtypes), strided=self.dims > 0, wide=wide)
        reads, writes = streams.of(rule.states, reads_grad=rule.reads_grad)
        per_block = sum(3 << at for at in rule.scales) if self.span else 0
        how = How(
            types=tuple(STORED[d] for d in self.dtypes),
            rule=function,
            numbers=rule.constants,
            reads=reads,
            writes=writes,
            dims=self.dims,
            aligned=self.aligned,
            block=shape.block,
            zero=zero,
            kept=self.kept,
            noisy=self.low * STATE | PARAM * (self.kept == STOCHASTIC.value),
            alone=not rule.reads_grad,
            span=self.span,
            per_block=per_block,
            rows=self.rows and bool(reads & (GRAD if rule.reads_grad else PARAM)),
        )
        return replace(how, **rest)

    @property
    def warps(self) -> int:
        """For such a pass."""
        wide = max(d.itemsize for d in self.dtypes) == 8
        return tuning.shape_for(len(self.dtypes), strided=self.dims > 0, wide=wide).warps


def reduce_spec(dtype: torch.dtype, method: Method, dims: int, aligned: bool) -> Spec:
    """The pass over gradients of one dtype and layout."""
    shape = tuning.shape_for(1, strided=dims > 0)
    wide = dtype == torch.float64
    return Spec(
        reduce,
        (
            ("T", STORED[dtype]),
            ("C", tl.float64 if wide else tl.float32),
            ("KIND", method.kind),
            ("P", method.norm_type if method.kind == POWER else 0.0),
            ("DIMS", dims),
            ("ALIGNED", aligned),
            ("CHUNK", CHUNK),
            ("BLOCK", shape.block),
        ),
        shape.warps,
    )


def rows_spec(dtype: torch.dtype, dims: int, length: int, *, of_grad: bool) -> Spec:
    """What sums up rows of so many elements: few widths, so that few kernels are compiled."""
    block = tuning.shape_for(1, strided=True).block
    width = next((w for w in (16, 128) if length <= w), block)
    constants = {
        "T": STORED[dtype],
        "C": tl.float64 if dtype == torch.float64 else tl.float32,
        "OF_GRAD": of_grad,
        "DIMS": dims,
        "WIDTH": width,
        "BLOCK": block,
    }
    return Spec(row_sums, tuple(constants.items()), 4)


def coefs_spec(param: torch.dtype) -> Spec:
    """What makes coefficients of these sums, in what is computed in."""
    kind = tl.float64 if param == torch.float64 else tl.float32
    return Spec(row_coefs, (("C", kind), ("BLOCK", tuning.FINALIZE_SPAN)), tuning.FINALIZE_WARPS)


def finalize_spec(
    rule: Rule, method: Method, *, noisy: bool = False, seeded: bool = False, counts: bool = False
) -> Spec:
    """What comes between reduce and apply."""
    asks = method.asks and not method.absorbs
    return Spec(
        finalize,
        (
            ("PREPARE", rule.prepare),
            ("HYPER", len(rule.hyper)),
            ("NUMBERS", rule.constants),
            ("ACCUMULATE", rule.accumulate),
            ("KIND", method.kind),
            ("P", method.norm_type if method.kind == POWER else 0.0),
            ("SCOPE", method.scope),
            ("REDUCES", method.reduces),
            ("ASKS", asks),
            ("NAMES", asks and method.names),
            ("NOISY", noisy),
            ("SEEDED", seeded),
            ("COUNTS", counts),
            ("BY_ROWS", method.by_rows),
            ("PARTS", method.parts and method.reduces),
            ("ROWS", tuning.FINALIZE_ROWS),
            ("SPAN", tuning.FINALIZE_SPAN),
            ("ROW_SPAN", tuning.FINALIZE_ROW_SPAN),
        ),
        tuning.FINALIZE_WARPS,
    )


def apply_spec(rule: Rule, form: Form, zero: bool, hyper: Sequence[float] = ()) -> Spec | None:
    """The pass of a rule over operands of this form; None: nothing is left to do."""
    if rule.update is None:
        return None
    draws = rule.draws(hyper) if rule.applies.draws else 0
    how = form.how(rule, rule.update, rule.applies, zero, draws=draws)
    return Spec(apply, (("HOW", how),), form.warps)


def pass_how(rule: Rule, k: int, hyper: Sequence[float], form: Form, zero: bool) -> How:
    """What pass number k of a rule is compiled for."""
    value = {
        "sum": NOTHING if summed_by_block(rule, k, form) else rule.sums(hyper)[k],
        "wide": form.wide,
        "collects": form.listed and k < len(rule.taken),
    }
    if form.absorbed:
        again = {"again": rule.again[k], "absorbed": True, "noisy": 0}
        return form.how(rule, None, rule.looks[k], zero, **again, **value)
    streams = rule.passes[k]
    if not rule.reads_param(hyper) and not streams.writes & PARAM:
        streams = replace(streams, reads=streams.reads & ~PARAM)
    return form.how(
        rule,
        rule.sources[k],
        streams,
        zero,
        # What apply, or a selection, rounds after this is rounded by other noise.
        turn=8 * (1 + k),
        draws=rule.draws(hyper) if streams.draws else 0,
        starts=form.starts if k == 0 else 0,
        keeps=rule.keeps_value and k == 0,
        **value,
    )


def look_spec(dtype: torch.dtype, dims: int, aligned: bool) -> Spec:
    """What looks at one gradient before it is absorbed."""
    of = reduce_spec(dtype, Method(0, False, False, False, float("inf"), True), dims, aligned)
    constants = tuple((name, value) for name, value in of.constants if name not in ("KIND", "P"))
    return Spec(look, constants, of.warps)


def admit_spec(rule: Rule, form: Form, method: Method) -> Spec:
    """What decides whether a gradient is absorbed, and makes the constants."""
    constants = {
        "PREPARE": rule.prepare,
        "HYPER": len(rule.hyper),
        "NUMBERS": rule.constants,
        "ASKS": method.asks,
        "NAMES": method.asks and method.names,
        "NOISY": bool(form.low) or form.kept == STOCHASTIC.value,
        "SPAN": tuning.FINALIZE_SPAN,
    }
    return Spec(admit, tuple(constants.items()), tuning.FINALIZE_WARPS)


def absorb_spec(rule: Rule, form: Form, hyper: Sequence[float], zero: bool) -> Spec:
    """The first pass of a rule, for one gradient that the step will find in the states."""
    now = replace(form, absorbed=False, listed=False)
    how = replace(pass_how(rule, 0, hyper, now, zero), sum=NOTHING, keeps=False)
    return Spec(source, (("HOW", how), ("GLOBAL", False)), form.warps)


def summed_by_block(rule: Rule, k: int, form: Form) -> bool:
    """Whether blocks have scales of their own in place of what pass k sums up."""
    return form.span > 0 and k < len(rule.scales)


def blocks_spec(rule: Rule, k: int, form: Form, zero: bool) -> Spec:
    """What makes the scales of blocks, after pass number k."""
    block = tuning.shape_for(1, strided=True).block
    how = form.how(
        rule, None, rule.looks[k], zero, again=rule.again[k], noisy=0, per_block=0, block=block
    )
    constants = (("HOW", how), ("LEVEL", rule.scales[0] - 1), ("PLACE", 2 * k))
    return Spec(block_scales, constants, 4)


def pass_specs(
    rule: Rule, k: int, hyper: Sequence[float], form: Form, method: Method
) -> tuple[Spec | None, Spec | None]:
    """Pass number k of a rule, and what makes constants of its values; None: nothing to do."""
    how = pass_how(rule, k, hyper, form, method.zero)
    everywhere = method.select is not None and method.select[1] == IN_ALL
    run = Spec(source, (("HOW", how), ("GLOBAL", everywhere)), form.warps)
    keeps = rule.keeps_scale and k == 0
    if summed_by_block(rule, k, form) and rule.sums(hyper)[k] != NOTHING:
        finish = blocks_spec(rule, k, form, method.zero)
        return run if how.writes or how.starts else None, finish
    if how.sum == NOTHING and not keeps:
        return run if how.writes or how.starts or how.collects else None, None
    finish = Spec(
        finish_pass,
        (
            ("PREPARE", rule.prepare),
            ("HYPER", len(rule.hyper)),
            ("NUMBERS", rule.constants),
            ("PASS", k),
            ("SUM", how.sum),
            ("SCOPE", method.pass_scopes[k]),
            ("KEEPS", keeps),
            ("ROWS", tuning.FINALIZE_ROWS),
            ("SPAN", tuning.FINALIZE_SPAN),
            ("ROW_SPAN", tuning.FINALIZE_ROW_SPAN),
        ),
        tuning.FINALIZE_WARPS,
    )
    return run, finish
