"""Steps of the CUDA backend on the host, for parameters and states that are torch tensors."""

from __future__ import annotations

import ctypes
import importlib.util
import sysconfig
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pybind11
import pytest
import torch
from torch import Tensor

from pysmooth.engine import backends

from .build import HERE, ROOT, library

MAX_STATES, MAX_OPERANDS, MAX_HYPER, MAX_STAGES = 4, 6, 16, 5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PARTS = 4
BINDING_FLAGS = [
    *('-DPYSMOOTH_BACKEND="cuda"', "-DPYSMOOTH_DEVICE=kDLCPU", "-O2", "-fvisibility=hidden"),
    *(f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"),
    f"-isystem{Path(torch.__file__).parent / 'include'}",  # has the header of DLPack
]


class _Memory(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("misplaced", ctypes.c_int64),
    ]


class _Operand(ctypes.Structure):
    _fields_ = [
        ("memory", _Memory),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("stride", ctypes.c_int64 * 8),
    ]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("rule", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("storage", ctypes.c_int32),
        ("by_rows", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
        ("operand", _Operand * MAX_OPERANDS),
        ("steps", ctypes.c_void_p),
        ("norm_sq", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("absorbed", ctypes.c_int64),
        ("site", ctypes.c_int64),
        *((n, ctypes.c_int64) for n in ("elements", "first_element", "counted")),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("groups", "scope")),
        ("stage_scope", ctypes.c_int32 * MAX_STAGES),
        *((n, ctypes.c_int32) for n in ("policy", "always_norm", "skip_unit_coef")),
        *((n, ctypes.c_int32) for n in ("order", "resident", "races", "multiprocessors")),
        ("norm_type", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        *((n, ctypes.c_int32) for n in ("selector", "select_scope", "scaled")),
        ("ratio", ctypes.c_double),
        ("k", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("select_seed", ctypes.c_uint64),
        ("absorbs", ctypes.c_int32),
        ("once", ctypes.c_uint32),
        *((n, ctypes.c_int32) for n in ("sites", "processes", "stages")),
        ("single", ctypes.c_int32),
    ]


class _Clip(ctypes.Structure):
    _fields_ = [
        ("mode", ctypes.c_int32),
        *((n, ctypes.c_double) for n in ("max_norm", "eps", "l0", "l1")),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        ("hyper", ctypes.c_double * MAX_HYPER),
        ("hyper_at", ctypes.c_void_p * MAX_HYPER),
        ("hyper_is_double", ctypes.c_uint32),
        ("maximize", ctypes.c_int32),
        ("clip", _Clip),
        ("clip_value", ctypes.c_double),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("unscale", ctypes.c_double),
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
    ]


@cache
def kernels() -> ctypes.CDLL:
    """The kernels of csrc/cuda, compiled for the host."""
    cuda = ROOT / "csrc" / "cuda"
    sources = [(str(cuda / "rules.cu"), [f"-DPYSMOOTH_PART={i}"]) for i in range(PARTS)]
    sources += [(str(cuda / f"{name}.cu"), []) for name in ("common", "codec")]
    plain = [
        (str(HERE / "harness.cpp"), [*BINDING_FLAGS, "-fvisibility=default"]),
        (str(HERE / "runtime.cpp"), []),
    ]
    plain += [(str(path), []) for path in (*sorted(cuda.glob("*.cpp")), cuda / "launch.cu")]
    plain += [(str(cuda / "messages.cu"), [])]
    bindings = ROOT / "csrc" / "bindings"
    bound = [*sorted(bindings.glob("cuda/*.cpp"))]
    bound += [bindings / f"{name}.cpp" for name in ("aliasing", "direct", "tensor_reader", "watch")]
    plain += [(str(path), BINDING_FLAGS) for path in bound]
    lib = library("kernels", sources, plain)
    for name in ("rule_name", "rule_hyper"):
        getattr(lib, name).restype = ctypes.c_char_p
    return lib


@cache
def module() -> types.ModuleType:
    """pysmooth._cuda, with CPU tensors for device memory and the emulation for a device."""
    spec = importlib.util.spec_from_file_location("pysmooth._cuda", kernels()._name)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def take_cpu_tensors(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU: "auto" finds this backend, then one that computes everything."""
    infos = {info.name: info for info in backends.REGISTERED}
    cuda = replace(infos["cuda"], devices=lambda: ("cpu",), auto=("cpu",))
    patch.setattr(backends, "REGISTERED", (cuda, infos["eager"]))


class Calls(NamedTuple):
    """What was called of the CUDA runtime so far: no other function exists (cuda_runtime.h)."""

    launches: int
    uploads: int
    downloads: int


def calls() -> Calls:
    """Counts of this process."""
    out = (ctypes.c_long * 3)()
    kernels().runtime_calls(out)
    return Calls(*out)


class Facts(NamedTuple):
    """What is known of a rule."""

    hyper: tuple[str, ...]
    states: int
    stages: int
    low_states: int
    reads_grad: bool
    counts_steps: bool
    accumulates: bool
    keeps_scale: bool
    selects: bool
    marks: bool
    absorbs: bool
    scales: int


@cache
def rules() -> dict[str, Facts]:
    """The rules, in the order of their numbers."""
    lib = kernels()
    out = {}
    for i in range(lib.rule_count()):
        hyper = tuple(lib.rule_hyper(i, k).decode() for k in range(lib.rule_hypers(i)))
        numbers = (ctypes.c_int * 11)()
        lib.rule_facts(i, numbers)
        flags = (bool(x) for x in numbers[3:10])
        out[lib.rule_name(i).decode()] = Facts(hyper, *numbers[:3], *flags, numbers[10])
    return out


@dataclass
class Slot:
    """A parameter with its gradient and states; the last may be followed by numbers."""

    rule: str
    param: Tensor | None
    grad: Tensor | None
    states: Sequence[Tensor] = ()
    norm_sq: Tensor | None = None
    scale: Tensor | None = None
    steps: Tensor | None = None
    group: int = 0
    first: bool = True
    storage: int = 0  # of the parameter; a companion comes after the rule's states
    misplaced: Sequence[int] = (0,) * MAX_OPERANDS  # bytes from a 16-byte boundary, per operand
    by_rows: bool = False  # as its gradient is clipped
    absorbed: int = 0  # gradients that the states hold
    site: int = 0  # the device that it lies on, or its process
    # Of a part: elements of the whole, where it begins in that if these are selected from
    # together, and whether it takes part though it is empty.
    part: tuple[int, int, bool] = (0, -1, False)


@dataclass
class Run:
    """How a step is run, and what it was."""

    hypers: Sequence[Sequence[float | Tensor]] = ()
    clips: Sequence[tuple[int, float, float, float, float, float, bool]] = ()
    scope: int = 0
    stage_scopes: Sequence[int] = (2, 0, 2, 2, 0)
    policy: int = 0
    norm_type: float = 2.0
    always_norm: bool = False
    skip_unit_coef: bool = False
    unscale: float = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    select: tuple[int, int, float, int, int, bool, int] = (0, 0, 0.0, 0, 1024, False, 0)
    order: int = 0
    seed: int = 1
    resident: int = 1
    races: bool = False
    multiprocessors: int = 132
    norms: list[float] = field(default_factory=list)
    coefs: list[float] = field(default_factory=list)
    skipped: bool = False
    nonfinite: bool = False
    nonfinite_tensors: list[bool] = field(default_factory=list)
    absorbs: int = 0  # gradients are taken in one by one: 1, then the step; 2, without a step
    once: int = 0  # hyper-parameters, as bits, that are 0 for all but the first of a step
    sites: int = 1  # devices
    processes: int = 0  # that hold parts of tensors; 0: these are whole
    stages: int = 1  # of a pipeline; as many processes belong to each
    torn: int = 0  # 1 + a tensor that took part in some processes only
    single: int = 0  # blocks of the one launch that the step is, if it can be; 0: it is several
    kept_out: int = 0  # gradients, or steps, that the policy refused


def _span(x: Tensor) -> tuple[int, int]:
    """First and last element of a tensor's memory, relative to where it starts."""
    steps = [(n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)]
    return sum(min(0, s) for s in steps), sum(max(0, s) for s in steps)


def _operand(x: Tensor | None, misplaced: int) -> _Operand:
    out = _Operand()
    if x is None:
        return out
    low, high = _span(x) if x.numel() else (0, -1)
    size = x.element_size()
    out.memory = _Memory(
        x.data_ptr() + low * size if x.numel() else ctypes.addressof(out),
        (high - low + 1) * size,
        -low * size,
        misplaced % 16,
    )
    out.dtype = DTYPES.index(x.dtype)
    out.ndim = x.ndim
    out.stride[: x.ndim] = x.stride()
    return out


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def step(slots: Sequence[Slot], run: Run) -> str:
    """One step, in place. Empty, or what was wrong with the kernels that ran."""
    lib = kernels()
    numbers = {name: i for i, name in enumerate(rules())}
    parameters = (_Parameter * max(1, len(slots)))()
    for p, slot in zip(parameters, slots, strict=False):
        shaped = slot.param if slot.param is not None else slot.grad
        assert shaped is not None
        p.rule, p.group, p.first = numbers[slot.rule], slot.group, int(slot.first)
        p.storage, p.by_rows, p.absorbed = slot.storage, int(slot.by_rows), slot.absorbed
        p.site = slot.site
        p.elements, p.first_element, p.counted = slot.part
        p.ndim = shaped.ndim
        p.shape[: shaped.ndim] = shaped.shape
        for k, x in enumerate((slot.param, slot.grad, *slot.states)):
            p.operand[k] = _operand(x, slot.misplaced[k])
        if slot.param is None:
            p.operand[0].dtype = p.operand[1].dtype
            p.operand[0].stride = p.operand[1].stride
        p.steps, p.norm_sq = _pointer(slot.steps), _pointer(slot.norm_sq)
        p.scale = _pointer(slot.scale)
    groups = (_Group * max(1, len(run.hypers)))()
    for g, hyper, clip in zip(groups, run.hypers, run.clips, strict=False):
        for i, value in enumerate(hyper):
            if isinstance(value, Tensor):
                g.hyper_at[i] = value.data_ptr()
                g.hyper_is_double |= (value.dtype == torch.float64) << i
            else:
                g.hyper[i] = value
        g.clip = _Clip(*clip[:5])
        g.clip_value, g.maximize = clip[5], int(clip[6])
    config = _Config(groups=len(run.hypers))
    for name in ("scope", "policy", "always_norm", "skip_unit_coef", "norm_type"):
        setattr(config, name, getattr(run, name))
    for name in ("order", "seed", "resident", "races", "multiprocessors"):
        setattr(config, name, getattr(run, name))
    for name in ("absorbs", "once", "sites", "processes", "stages", "single"):
        setattr(config, name, getattr(run, name))
    config.stage_scope[: len(run.stage_scopes)] = tuple(run.stage_scopes)
    kind, scope, ratio, k, block, scaled, seed = run.select
    config.selector, config.select_scope, config.ratio = kind, scope, ratio
    config.k, config.block, config.scaled, config.select_seed = k, block, scaled, seed
    numbers_in = _Step(run.unscale, _pointer(run.grad_scale), _pointer(run.found_inf))
    units = (ctypes.c_double * (len(slots) + len(run.hypers) + 1))()
    coefs = (ctypes.c_double * max(1, len(slots)))()
    status = (ctypes.c_int * 4)()
    bad = (ctypes.c_uint * max(1, len(slots)))()
    error = ctypes.create_string_buffer(256)
    lib.emulated_step(
        *(ctypes.byref(config), parameters, len(slots), groups, ctypes.byref(numbers_in)),
        *(units, coefs, status, bad, error),
    )
    for p, slot in zip(parameters, slots, strict=False):
        slot.first, slot.absorbed = bool(p.first), p.absorbed
    count = {0: 1, 1: len(run.hypers), 2: len(slots)}[run.scope]
    run.norms, run.coefs = list(units)[:count], list(coefs)[: len(slots)]
    run.skipped, run.nonfinite, run.kept_out = bool(status[0]), bool(status[1]), status[2]
    run.torn = status[3]
    run.nonfinite_tensors = [bool(x) for x in bad[: len(slots)]]
    return error.value.decode()


def tensors_of(slot: Slot) -> list[Any]:
    """Everything that a step may write."""
    return [slot.param, *slot.states, slot.norm_sq, slot.scale, slot.steps]
