"""Types of the native CUDA module (csrc/bindings/cuda), which not every installation has."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, TypedDict

from torch import Tensor

device_type: str

def set_direct_enabled(enabled: bool) -> None: ...
def uses_direct() -> bool: ...
def set_single_launch(single: bool | None) -> None: ...

class UnsupportedError(TypeError): ...

class RuleInfo(TypedDict):
    name: str
    hyper: tuple[str, ...]
    states: int
    low_states: int
    reads_grad: bool
    counts_steps: bool
    accumulates: bool

class Site:
    @property
    def bytes(self) -> int: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def norm_at(self) -> int: ...
    @property
    def board(self) -> tuple[int, int]: ...  # where it begins; bytes of a row, 0: there is none
    @property
    def exchanged(self) -> tuple[dict[str, int], list[int]]: ...  # where; tensors of histograms
    @property
    def joined(self) -> int: ...  # numbers that stages of a pipeline add up, at most
    @property
    def count(self) -> int: ...  # of the plan's sites
    @property
    def places(self) -> dict[str, tuple[int, int]]: ...
    def upload(self, memory: int, stream: int, /) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        params: list[Tensor],
        grads: list[Tensor],
        state: dict[Any, Any],
        state_dicts: list[dict[str, Any]],
        state_keys: list[tuple[str, ...]],
        rules: list[str],
        groups: list[int],
        names: list[str],
        first: list[bool],
        param_storage: list[int],
        by_rows: list[bool],
        state_roots: list[Tensor],
        scope: int,
        policy: int,
        norm_type: float,
        stage_scopes: list[int],
        select: tuple[int, int, float, int, int, bool, int] | None,
        absorbed: list[int],  # gradients that each parameter's states hold; empty: none is absorbed
        sites: list[int],  # at which device each parameter is
        # Of parts of larger tensors: elements of these; where the part begins, or -1; whether an
        # empty one takes part. None: all are whole.
        parts: list[tuple[int, int, bool]],
        joins: bool,
    ) -> None: ...
    @property
    def sites(self) -> list[Site]: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        hypers: Sequence[tuple[float | Tensor, ...]],
        clips: Sequence[tuple[int, float, float, float, float, float, bool]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        inputs: int,
        stream: int,
        /,
    ) -> bool: ...
    def begin(self, groups: list[dict[str, Any]], state: dict[Any, Any], /) -> bool: ...
    def enqueue(
        self,
        site: int,
        phase: int,
        hypers: Sequence[tuple[float | Tensor, ...]],
        clips: Sequence[tuple[int, float, float, float, float, float, bool]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        inputs: int,
        stream: int,
        /,
    ) -> int: ...
    # What is to be exchanged after a phase, whether the largest is taken, numbers of units.
    def meeting(self, phase: int, /) -> tuple[Meeting, bool, int]: ...
    def end(self, done: bool, /) -> None: ...
    def holds(self, place: int, /) -> bool: ...
    def absorb(
        self,
        place: int,
        hyper: tuple[float | Tensor, ...],
        clip: tuple[int, float, float, float, float, float, bool],
        once: int,
        stream: int,
        /,
    ) -> None: ...

class Meeting(Enum):
    DEVICES = 1
    PARTS = 2
    UNITS = 3
    HISTOGRAMS = 4

class Part(Enum):
    WHOLE = 0
    NORMS = 1
    REST = 2

class ClipPlan:
    def __init__(self, grads: list[Tensor], norm_type: float, sites: list[int], /) -> None: ...
    @property
    def sites(self) -> list[Site]: ...
    @property
    def is_wide(self) -> bool: ...
    def begin(self, grads: list[Tensor], writes: bool, /) -> bool: ...
    def run(
        self,
        site: int,
        phase: int,
        max_norm: float,
        part: Part,
        inputs: int,
        stream: int,
        /,
    ) -> int: ...
    def written(self, grads: list[Tensor], /) -> None: ...

# Launches of the codec (csrc/cuda/codec.h): on a stream, of numbers and addresses by name.
def code_signs(stream: int, /, **given: float) -> None: ...
def subtract_signs(stream: int, /, **given: float) -> None: ...
def sum_signs(stream: int, /, **given: float) -> None: ...
def vote(stream: int, /, **given: float) -> None: ...
def code_natural(stream: int, /, **given: float) -> None: ...
def sum_natural(stream: int, /, **given: float) -> None: ...
def code_levels(stream: int, /, **given: float) -> None: ...
def sum_levels(stream: int, /, **given: float) -> None: ...
def weigh(stream: int, /, **given: float) -> None: ...
def emit(stream: int, /, **given: float) -> None: ...
def pack(stream: int, /, **given: float) -> None: ...
def scatter(stream: int, /, **given: float) -> None: ...
def count_marks(stream: int, /, **given: float) -> None: ...
def spread(stream: int, /, **given: float) -> None: ...
def code_drawn(stream: int, /, **given: float) -> None: ...
def add_drawn(stream: int, /, **given: float) -> None: ...
def sums_of(n: int, /) -> int: ...
def squares_of(n: int, block: int, /) -> int: ...
def tiles_of(n: int, /) -> int: ...

search_bytes: int
spoiled_at: int

def rules() -> list[RuleInfo]: ...
def missing() -> str | None: ...
