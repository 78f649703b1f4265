"""Compiles the kernels ahead of time, without a GPU, and looks at what came out.

    python -m pysmooth.triton_kernels.compile [--targets cuda:80,cuda:90,hip:gfx942] [--rules adam]

For every kernel and target: registers, spills, shared memory, how many accesses of 16 bytes. Fails
if a kernel spills more than 16 bytes; if an aligned pass has other accesses than these, or reorders
elements between threads; if an update rule holds an approximate division, root or fused
multiply-add.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import messages
from .absorb import VALUES
from .absorption import BEGIN_ABSORBED
from .apply import apply
from .block_scales import block_scales
from .finalize import finalize, finish_pass
from .how import KAHAN, MASTER, STOCHASTIC, How
from .launch import Spec
from .parts import adopt_spec, tell_spec
from .rand_k import rand_k
from .rule import Rule
from .rules import RULES
from .sample import sample
from .select import narrow, select_block, selected, ties
from .selection import SETTLE, begin_spec, select_specs
from .source import source
from .specs import (
    BLOCK,
    IN_TENSOR,
    SQUARES,
    TOP_K,
    Form,
    Method,
    absorb_spec,
    admit_spec,
    apply_spec,
    coefs_spec,
    finalize_spec,
    look_spec,
    pass_specs,
    reduce_spec,
    rows_spec,
)
from .spread import adopt, tell

# Kernels that change parameters or states, or choose what is changed.
EXACT = (apply, source, block_scales, sample, narrow, selected, ties, select_block, rand_k)
EXACT += tuple(spec.kernel for spec in messages.SPECS.values())
TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# What a kernel's arguments are; all others point to 32-bit integers.
WIDE = {
    "parts",
    "torn",
    *("tensors", "gradients", "layouts", "amp", "counters", "taken"),
    *("units", "histogram", "samples", "places", "tallies"),
}
FLOATS = {
    "rows",
    "least",
    "param_sums",
    "grad_sums",
    "smallest",
    "squares",
    "squares_of",
    "partials",
    "norms",
    "coefs",
    "known",
    "hypers",
    "sums",
    "lengths",
    "spec",
    "rates",
}
UNSIGNED = {"keys", "seeds"}
COUNTS = {"count", "shift", "width"}  # and, of those that take a few tensors:
MORE_COUNTS = {"members", "chunks", "groups"}
COUNTING = (finalize, finish_pass, tell, adopt)


@dataclass
class Report:
    """What one kernel became."""

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    text: str


def method(**kwargs: Any) -> Method:
    """A step as optimizers have it, but for what is given."""
    usual = {"scope": 0, "asks": False, "names": False, "zero": False, "norm_type": 2.0}
    return Method(**{**usual, "reduces": True, **kwargs})


def forms(rule: Rule) -> Iterator[tuple[str, Form]]:
    """What tensors of a rule look like, in the ways that make another kernel."""
    marks = (torch.uint8,) * rule.marks
    states = (*(F32,) * (rule.states - rule.marks), *marks)
    yield "float32", Form((F32, F32, *states))
    yield "float64", Form((*(F64,) * (2 + rule.states - rule.marks), *marks))
    yield "bfloat16", Form((BF16, BF16, *states))
    if rule.low_states:
        low = (BF16 if rule.low_states >> k & 1 else F32 for k in range(rule.states))
        yield "low", Form((F32, F32, *low), low=rule.low_states)
    if rule.name in ("adam", "ef21_select"):
        yield "master", Form((BF16, BF16, *states, F32), kept=MASTER.value)
        yield "kahan", Form((BF16, BF16, *states, BF16), kept=KAHAN.value)
        yield "stochastic", Form((BF16, BF16, *states), kept=STOCHASTIC.value)
    if rule.name in ("sgd", "ef_sgd_select"):
        yield "rows", Form((F32, F32, *states), rows=True)
    if rule.name in ("adam", "sgd"):
        yield "unaligned", Form((F32, F32, *states), aligned=False)
        yield "strided", Form((F32, F32, *states), dims=4, aligned=False)
        yield "float16, float32", Form((F16, F32, *states))


def specs(rules: list[str]) -> Iterator[tuple[str, Spec]]:
    """One of every kind; not every combination of dtypes with every rule."""
    for dtype in (F32, F64, F16, BF16):
        yield f"reduce {dtype}", reduce_spec(dtype, method(), 0, True)
    for norm_type in (1.0, 3.0, float("inf")):
        yield f"reduce L{norm_type:g}", reduce_spec(F32, method(norm_type=norm_type), 0, True)
    yield "reduce unaligned", reduce_spec(F32, method(), 0, False)
    yield "reduce strided", reduce_spec(F32, method(), 4, False)
    for dtype in (F32, BF16):
        yield f"look {dtype}", look_spec(dtype, 0, True)
    yield "look strided", look_spec(F32, 4, False)
    yield "begin absorbed", BEGIN_ABSORBED
    for dtype, length, dims in ((F32, 9, 0), (BF16, 100, 4), (F32, 5000, 0), (F64, 5000, 0)):
        for of_grad in (False, True):
            yield f"rows of {length}", rows_spec(dtype, dims, length, of_grad=of_grad)
        yield f"coefficients {dtype}", coefs_spec(dtype)
    for name, spec in messages.SPECS.items():
        yield f"codec: {name}", spec
    for norm_type in (2.0, 3.0, float("inf")):
        kind = method(norm_type=norm_type).kind
        for is_pass in (False, True) if kind == SQUARES else (False,):
            what = f"parts of L{norm_type:g}, {'pass' if is_pass else 'reduce'}"
            yield f"tell {what}", tell_spec(kind, is_pass=is_pass, by_rows=not is_pass)
            yield f"adopt {what}", adopt_spec(kind, is_pass=is_pass)
    for name in rules:
        yield from specs_of(RULES[name])
    for scope in (1, 2):
        how = method(
            scope=scope, asks=True, names=True, norm_type=3.0, by_rows=True, parts=scope == 2
        )
        spec = finalize_spec(RULES["adam"], how, noisy=True, seeded=True, counts=True)
        yield f"adam finalize scope {scope}", spec


def specs_of(rule: Rule) -> Iterator[tuple[str, Spec]]:
    """All kernels of one rule."""
    yield f"{rule.name} finalize", finalize_spec(rule, method(), counts=True)
    hyper = [1.0] * len(rule.hyper)  # with weight decay, normalised, by scaled signs
    drawing = [4.0 if name == "compressor" else 1.0 for name in rule.hyper]
    for what, form in forms(rule):
        if rule.taken:
            form = dataclasses.replace(form, listed=True, wide=form.dtypes[0] == F64)
        if (spec := apply_spec(rule, form, False, hyper)) is not None:
            yield f"{rule.name} {what}", spec
        compresses = "compressor" in rule.hyper
        if compresses and (spec := apply_spec(rule, form, False, drawing)) is not None:
            if rule.draws(drawing) and rule.applies.draws:
                yield f"{rule.name} {what}, drawing", spec
        how = method(pass_scopes=(0, 2, 2, 2, 0))
        for k in range(len(rule.sources)):
            run, finish = pass_specs(rule, k, hyper, form, how)
            if run is not None:
                yield f"{rule.name} {what}, pass {k}", run
            if finish is not None and what == "float32":
                yield f"{rule.name} after pass {k}", finish
            run, _ = pass_specs(rule, k, drawing, form, how)
            if run is not None and rule.draws(drawing) and rule.passes[k].draws:
                yield f"{rule.name} {what}, pass {k}, drawing", run
        if rule.absorbs:
            yield from absorbing(rule, what, form, hyper)
        if rule.scales and what in ("float32", "float64"):
            yield from blocks(rule, what, dataclasses.replace(form, span=1024))
        if rule.taken and what in ("float32", "float64", "kahan"):
            yield from selection(rule, what, form)


def absorbing(
    rule: Rule, what: str, form: Form, hyper: Sequence[float]
) -> Iterator[tuple[str, Spec]]:
    """What takes one gradient in; and the pass of a step that finds it in the states."""
    how = method(asks=True, names=True, absorbs=True, pass_scopes=(2,))
    if what in ("float32", "low"):
        yield f"{rule.name} {what}, admit", admit_spec(rule, form, how)
    yield f"{rule.name} {what}, absorb", absorb_spec(rule, form, hyper, False)
    absorbed, _ = pass_specs(rule, 0, hyper, dataclasses.replace(form, absorbed=True), how)
    if absorbed is not None:
        yield f"{rule.name} {what}, absorbed", absorbed


def blocks(rule: Rule, what: str, form: Form) -> Iterator[tuple[str, Spec]]:
    """What a compressor with a scale per block takes: the scales, and who reads them."""
    dithering = [3.0 if name == "compressor" else 1.0 for name in rule.hyper]
    how = method(pass_scopes=(BLOCK,) * len(rule.scales) + (0,) * 3)
    for k in range(len(rule.sources)):
        run, finish = pass_specs(rule, k, dithering, form, how)
        if run is not None and rule.passes[k].draws:
            yield f"{rule.name} {what}, pass {k}, blocks", run
        if finish is not None and k < len(rule.scales):
            yield f"{rule.name} {what}, pass {k}, scales", finish
    if rule.applies.draws and (spec := apply_spec(rule, form, False, dithering)) is not None:
        yield f"{rule.name} {what}, blocks", spec


def selection(rule: Rule, what: str, form: Form) -> Iterator[tuple[str, Spec]]:
    """The kernels of a selection."""
    select = (TOP_K, IN_TENSOR, 0.01, 0, 1024, False, 0)
    kernels = select_specs(rule, 0, [1.0] * len(rule.hyper), form, method(select=select))
    if rule.name not in ("ef_sgd_select", "ef21_select"):
        kernels = {"selected": kernels["selected"]}
    elif what != "kahan":
        for everywhere in (False, True):
            kernels[f"begin, {everywhere}"] = begin_spec(rule, everywhere, form.wide)
        kernels["settle"] = SETTLE
    for name, spec in kernels.items():
        yield f"{rule.name} {what}, {name}", spec


def signature(spec: Spec) -> dict[str, str]:
    """The types of a kernel's arguments."""
    constants = dict(spec.constants)
    how = constants.get("HOW")
    codec_kernels = [other.kernel for other in messages.SPECS.values()]
    out = {}
    for name in spec.kernel.arg_names:
        if name in constants:
            out[name] = "constexpr"
        elif spec.kernel in codec_kernels:
            out[name] = messages.TYPES[name]
        elif name in VALUES:
            out[name] = "i64"
        elif name in COUNTS or (name in MORE_COUNTS and spec.kernel in COUNTING):
            out[name] = "i32"
        elif name in WIDE or (name == "list_keys" and how is not None and how.wide):
            out[name] = "*i64"
        elif name in FLOATS:
            out[name] = "*fp64"
        elif name == "numbers":
            out[name] = f"*{how.compute}" if how is not None else "*fp32"
        else:
            out[name] = "*u32" if name in UNSIGNED else "*i32"
    return out


def compile_spec(name: str, spec: Spec, target: str) -> Report:
    """Compiles one kernel for one target."""
    types = signature(spec)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"
    }
    source = triton.compiler.ASTSource(
        fn=spec.kernel, signature=types, constexprs=dict(spec.constants), attrs=aligned
    )
    made = triton.compile(source, target=TARGETS[target], options=spec.options)
    text = made.asm.get("ptx") or made.asm["amdgcn"]
    registers, spills = _resources(made, text)
    return Report(name, target, registers, spills, made.metadata.shared, text)


def _resources(made: Any, text: str) -> tuple[int, int]:
    """Registers per thread, and bytes spilled."""
    if "cubin" not in made.asm:
        counts = [int(n) for n in re.findall(r"^\s*\.vgpr_count:\s*(\d+)", text, re.M)]
        spilled = [int(n) for n in re.findall(r"^\s*\.vgpr_spill_count:\s*(\d+)", text, re.M)]
        return max(counts), sum(spilled)
    # NVIDIA's binary knows its registers, and its stack: without calls, that is what was spilled.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def vectors(report: Report) -> int:
    """How many accesses of 16 bytes there are."""
    wide = r"global\S*\.v4\.b32|global\S*\.v2\.b64|global_\w+_dwordx4"
    return len(re.findall(wide, report.text))


def narrow_accesses(
    report: Report, spec: Spec, streams: int, kind: Any, block: int
) -> Iterator[str]:
    """Complains where there are fewer accesses of 16 bytes than there are to be."""
    threads = spec.warps * TARGETS[report.target].warp_size
    expected = streams * block * kind.primitive_bitwidth // (threads * 128)
    if vectors(report) < expected:
        yield f"{vectors(report)} accesses of 16 bytes, not {expected}"


def faults(report: Report, spec: Spec) -> list[str]:
    """What must not be."""
    out = []
    values = dict(spec.constants)
    # A loop counter may go there, where it saves registers; what holds a whole block may need more.
    if report.spills > (64 if spec.kernel is select_block else 16):
        out.append(f"{report.spills} bytes spilled")
    how = values.get("HOW")
    if isinstance(how, How) and spec.kernel in (apply, source):
        # A sum takes a little, a list of candidates more; words that are drawn are put in order.
        room = 8192 if how.collects else 1024
        if report.shared > room and not how.draws:
            out.append(f"operands go through {report.shared} B of shared memory")
        if how.aligned:
            same = {t.primitive_bitwidth for t in how.types}
            streams = (how.reads.bit_count() + how.writes.bit_count()) * (len(same) == 1)
            out += narrow_accesses(report, spec, streams, how.types[0], how.block)
    elif values.get("ALIGNED"):
        out += narrow_accesses(report, spec, 1, values["T"], values["BLOCK"])
    if report.target.startswith("cuda") and spec.kernel in EXACT:
        # Rounding down is the same for all but negative subnormal numbers, which nobody rounds.
        exact = report.text.replace("cvt.rmi.ftz.f32.f32", "")
        rough = set(re.findall(r"\S*\.(?:approx|full|ftz)\S*|\bfma\.\S+", exact))
        if rough:
            out.append(f"not exact: {', '.join(sorted(rough))}")
    return out


def main() -> int:
    """Compiles, prints, complains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--rules", default=",".join(RULES))
    options = parser.parse_args()
    failed = 0
    print(f"triton {triton.__version__}")
    for name, spec in specs(options.rules.split(",")):
        for target in options.targets.split(","):
            report = compile_spec(name, spec, target)
            wrong = faults(report, spec)
            failed += bool(wrong)
            print(
                f"{name:36} {target:11} {report.registers:4} registers {report.shared:6} B shared"
                f" {vectors(report):4} vectors" + "".join(f"\n    {fault}" for fault in wrong),
                flush=True,
            )
    print("no complaints" if not failed else f"{failed} kernels are not as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
