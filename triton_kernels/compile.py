"""Compiles the kernels ahead of time, without a GPU, and looks at what came out.

    python -m pysmooth.triton_kernels.compile [--targets cuda:80,cuda:90,hip:gfx942] [--rules adam]

For every kernel and target: registers, spills, shared memory, how many accesses of 16 bytes. Fails
if a kernel spills more than 16 bytes; if an aligned pass has other accesses than these, or reorders
elements between threads; if an update rule holds an approximate division, root or fused
multiply-add.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .apply import apply
from .finalize import finalize, finish_pass
from .launch import Spec
from .plan import Method, apply_spec, finalize_spec, pass_specs, reduce_spec
from .rules import RULES
from .source import source

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# What a kernel's arguments are; all others point to 32-bit integers.
WIDE = {"tensors", "gradients", "layouts", "amp", "counters"}
FLOATS = {"partials", "norms", "coefs", "known", "hypers", "sums", "lengths"}
COUNTS = {"members", "chunks", "groups"}


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


def specs(rules: list[str]) -> Iterator[tuple[str, Spec]]:
    """One of every kind; not every combination of dtypes with every rule."""
    for dtype in (F32, F64, F16, BF16):
        yield f"reduce {dtype}", reduce_spec(dtype, method(), 0, True)
    for norm_type in (1.0, 3.0, float("inf")):
        yield f"reduce L{norm_type:g}", reduce_spec(F32, method(norm_type=norm_type), 0, True)
    yield "reduce unaligned", reduce_spec(F32, method(), 0, False)
    yield "reduce strided", reduce_spec(F32, method(), 4, False)
    for name in rules:
        rule = RULES[name]
        states = (F32,) * rule.states
        plain = (F32, F32, *states)
        yield f"{name} float32", apply_spec(rule, plain, 0, True, 0, False)
        yield f"{name} finalize", finalize_spec(rule, method(), False, counts=True)
        yield f"{name} float64", apply_spec(rule, (F64,) * len(plain), 0, True, 0, False)
        yield f"{name} bfloat16", apply_spec(rule, (BF16, BF16, *states), 0, True, 0, False)
        for k in range(len(rule.sources)):
            hyper = [1.0] * len(rule.hyper)  # with weight decay, normalised, by scaled signs
            how = method(pass_scopes=(0, 2))
            run, finish = pass_specs(rule, k, hyper, plain, 0, True, 0, how)
            yield f"{name} float32, pass {k}", run
            if finish is not None:
                yield f"{name} after pass {k}", finish
        if rule.low_states:
            low = [BF16 if rule.low_states >> k & 1 else F32 for k in range(rule.states)]
            dtypes = (F32, F32, *low)
            yield f"{name} low", apply_spec(rule, dtypes, 0, True, rule.low_states, False)
    for name in {"adam", "sgd"} & set(rules):
        rule = RULES[name]
        plain = (F32, F32, *(F32,) * rule.states)
        yield f"{name} unaligned", apply_spec(rule, plain, 0, False, 0, True)
        yield f"{name} strided", apply_spec(rule, plain, 4, False, 0, False)
        mixed = (F16, F32, *(F32,) * rule.states)
        yield f"{name} float16, float32", apply_spec(rule, mixed, 0, True, 0, False)
        for scope in (1, 2):
            how = method(scope=scope, asks=True, names=True, norm_type=3.0)
            yield f"{name} finalize scope {scope}", finalize_spec(rule, how, True, counts=True)


def signature(spec: Spec) -> dict[str, str]:
    """The types of a kernel's arguments."""
    constants = dict(spec.constants)
    out = {}
    for name in spec.kernel.arg_names:
        if name in constants:
            out[name] = "constexpr"
        elif name in COUNTS and spec.kernel in (finalize, finish_pass):
            out[name] = "i32"
        elif name in WIDE:
            out[name] = "*i64"
        elif name in FLOATS:
            out[name] = "*fp64"
        elif name == "numbers":
            wide = str(constants.get("C")) == "fp64"
            out[name] = "*fp64" if wide else "*fp32"
        else:
            out[name] = "*u32" if name == "keys" else "*i32"
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


def faults(report: Report, spec: Spec) -> list[str]:
    """What must not be."""
    out = []
    values = dict(spec.constants)
    if report.spills > 16:  # a loop counter may go there, where it saves registers
        out.append(f"{report.spills} bytes spilled")
    if values.get("ALIGNED"):
        streams = 1
        if spec.kernel in (apply, source):
            if report.shared > 1024:  # a sum takes a little
                out.append(f"operands go through {report.shared} B of shared memory")
            same = {t.primitive_bitwidth for t in values["TYPES"]}
            streams = sum(values[x].bit_count() for x in ("READS", "WRITES")) * (len(same) == 1)
        bits = values.get("T", values.get("TYPES", (None,))[0]).primitive_bitwidth
        threads = spec.warps * TARGETS[report.target].warp_size
        expected = streams * values["BLOCK"] * bits // (threads * 128)
        if vectors(report) < expected:
            out.append(f"{vectors(report)} accesses of 16 bytes, not {expected}")
    if report.target.startswith("cuda") and spec.kernel in (apply, source):
        rough = set(re.findall(r"\S*\.(?:approx|full|ftz)\S*|\bfma\.\S+", report.text))
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
