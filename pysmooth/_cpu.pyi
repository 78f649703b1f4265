"""Types of the native CPU module (csrc/bindings)."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

from .distributed.exchange import Exchange

class UnsupportedError(TypeError): ...

class RuleInfo(TypedDict):
    name: str
    hyper: tuple[str, ...]
    states: int
    counts_steps: bool
    accumulates: bool
    dtypes: tuple[tuple[str, str], ...]

class BackwardSums:
    def __init__(self, norm_type: float) -> None: ...
    def __call__(self, param: Tensor, /) -> None: ...

class Watch:
    def __init__(
        self,
        *,
        params: list[Tensor],
        grads: list[Tensor | None],
        state_dicts: list[dict[str, Any]],
        state_keys: list[tuple[str, ...]],
        state: dict[Any, Any],
        roots: list[Tensor],
        aligns: bool,
    ) -> None: ...
    def look(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> bytes | None: ...
    def count_written(self) -> None: ...

class StateSnapshot:
    def __init__(self, state: Mapping[Tensor, Any]) -> None: ...
    def same(self, state: Mapping[Tensor, Any]) -> bool: ...

class Plan:
    def __init__(
        self,
        *,
        params: list[Tensor],
        state_dicts: list[dict[str, Any]],
        state_keys: list[tuple[str, ...]],
        rules: list[str],
        groups: list[int],
        names: list[str],
        first: list[bool],
        state_roots: list[Tensor],
        scope: int,
        policy: int,
        norm_type: float,
        stage_scopes: list[int],
        select: tuple[int, int, float, int, int, bool, int] | None,
        low_states: list[int],
        param_storage: list[int],
        by_rows: list[bool],
        sums: list[BackwardSums | None],
        absorbs: bool,
    ) -> None: ...
    def set_exchange(self, exchange: Exchange, elements: list[int], jointly: bool) -> None: ...
    def selections(self) -> tuple[int, int]: ...
    def step(
        self,
        param_lists: list[list[Tensor]],
        hypers: Sequence[tuple[float, ...]],
        clips: Sequence[tuple[int, float, float, float, float, float, bool]],
        threads: int,
        unscale: float,
        trusts_sums: bool,
        /,
    ) -> int: ...
    def absorb(
        self,
        parameter: int,
        hyper: tuple[float, ...],
        clip: tuple[int, float, float, float, float, float, bool],
        threads: int,
        /,
    ) -> int: ...
    def norms(self) -> list[float]: ...
    def coefs(self) -> list[float]: ...
    def applied(self) -> bool: ...
    def active(self) -> list[bool]: ...
    def summed(self) -> int: ...
    def nonfinite_names(self) -> list[str]: ...
    @property
    def reduced(self) -> bool: ...

def grad_norm(tensors: list[Tensor], norm_type: float, threads: int) -> tuple[float, bool]: ...
def clip_grad_norm(
    params: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    threads: int,
) -> tuple[float, bool, bool]: ...
def agc(params: list[Tensor], factor: float, eps: float, threads: int) -> None: ...
def scale(tensors: list[Tensor], coef: float, threads: int) -> None: ...
def fill_zero(tensors: list[Tensor], threads: int) -> None: ...
def probe_mix(rw: list[Tensor], r: list[Tensor], threads: int) -> None: ...
def probe_copy(dst: Tensor, src: Tensor, threads: int) -> None: ...
def code(
    g: int, e: int, a: float, b: float, n: int, out: int, bits: int, threads: int, /
) -> float: ...
def code_top_k(
    g: int,
    e: int,
    a: float,
    b: float,
    n: int,
    k: int,
    out: int,
    index: int,
    values: int,
    threads: int,
    /,
) -> float: ...
def subtract_signs(x: int, n: int, scale: float, threads: int, /) -> None: ...
def sum_signs(
    first: int,
    stride: int,
    ranks: int,
    scales: int,
    n: int,
    factor: float,
    out: int,
    signs: int,
    threads: int,
    /,
) -> None: ...
def sum_top_k(
    first: int,
    stride: int,
    ranks: int,
    n: int,
    k: int,
    factor: float,
    base: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def code_natural(
    g: int,
    e: int,
    a: float,
    b: float,
    n: int,
    seed: int,
    step: int,
    tensor: int,
    out: int,
    message: int,
    threads: int,
    /,
) -> None: ...
def sum_natural(first: int, stride: int, ranks: int, n: int, out: int, threads: int, /) -> None: ...
def code_levels(
    g: int,
    e: int,
    a: float,
    b: float,
    n: int,
    seed: int,
    step: int,
    tensor: int,
    levels: int,
    block: int,
    out: int,
    message: int,
    threads: int,
    /,
) -> None: ...
def sum_levels(
    first: int,
    stride: int,
    ranks: int,
    n: int,
    levels: int,
    block: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def permutation(k: int, size: int, seed: int, step: int, tensor: int, out: int, /) -> None: ...
def sum_clients(
    addresses: list[int], weights: list[float], wide: bool, n: int, out: int, threads: int, /
) -> float: ...
def dot_clients(
    addresses: list[int], wide: bool, n: int, other: int, out: int, threads: int, /
) -> None: ...
def pack_bits(numbers: int, n: int, width: int, out: int, /) -> None: ...
def unpack_bits(packed: int, n: int, width: int, numbers: int, /) -> None: ...
def rules() -> list[RuleInfo]: ...
def isa() -> str: ...
def isa_levels() -> list[str]: ...
def set_isa(isa: str) -> None: ...
def set_direct_enabled(enabled: bool) -> None: ...
def uses_direct() -> bool: ...
def set_dlpack_enabled(enabled: bool) -> None: ...
def uses_dlpack() -> bool: ...
