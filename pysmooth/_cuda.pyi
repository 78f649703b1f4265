"""Types of the native CUDA module (csrc/bindings/cuda), which not every installation has."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, TypedDict

from torch import Tensor

device_type: str

def set_direct_enabled(enabled: bool) -> None: ...
def uses_direct() -> bool: ...

class UnsupportedError(TypeError): ...

class RuleInfo(TypedDict):
    name: str
    hyper: tuple[str, ...]
    states: int
    low_states: int
    reads_grad: bool
    counts_steps: bool
    accumulates: bool

class Plan:
    def __init__(
        self,
        *,
        params: list[Tensor],
        grads: list[Tensor],
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
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def places(self) -> dict[str, tuple[int, int]]: ...
    def upload(self, memory: int, stream: int, /) -> None: ...
    def step(
        self,
        param_lists: list[list[Tensor]],
        hypers: Sequence[tuple[float | Tensor, ...]],
        clips: Sequence[tuple[int, float, float, float, float, float, bool]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        inputs: int,
        stream: int,
        /,
    ) -> bool: ...
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

class Part(Enum):
    WHOLE = 0
    NORMS = 1
    REST = 2

class ClipPlan:
    def __init__(self, grads: list[Tensor], norm_type: float, /) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def norm_at(self) -> int: ...
    @property
    def is_wide(self) -> bool: ...
    def upload(self, memory: int, stream: int, /) -> None: ...
    def run(
        self,
        grads: list[Tensor],
        max_norm: float,
        part: Part,
        writes: bool,
        inputs: int,
        stream: int,
        /,
    ) -> bool: ...

def rules() -> list[RuleInfo]: ...
def missing() -> str | None: ...
