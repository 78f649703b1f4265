"""The kernels behind the optimizers, rule by rule: every dtype pair, every path, every tail.

Loads, stores and norms of single dtypes: test_arithmetic.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import _cpu
from pysmooth.engine import probe

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
SGD_PAIRS = sorted(next(r for r in _cpu.rules() if r["name"] == "sgd_momentum")["dtypes"])
HYPERS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
    {"max_norm": 0.5, "momentum": 0.9},
    {"max_norm": 0.5, "clip": "smooth", "scope": "tensor"},
    {"max_norm": 0.5, "clip": "normalize", "norm_type": 1.0},
    {"max_norm": 0.5, "clip": "value", "momentum": 0.9},
]


@pytest.fixture(params=_cpu.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def bits(x: Tensor) -> Tensor:
    """The bit patterns, all NaN alike."""
    x = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
    return x.contiguous().view(BITS[x.dtype])


def with_gap(x: Tensor) -> Tensor:
    """The same values, two elements apart: kernels go element by element there."""
    spread: Tensor = torch.zeros((*x.shape, 2), dtype=x.dtype)[..., 0]
    return spread.copy_(x)


def scaled(grad: Tensor, coef: float) -> Tensor:
    p = Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    p.grad = grad
    _cpu.scale([grad], coef, 2)
    return grad


def steps(
    param: Tensor, grads: list[Tensor], backend: str = "cpu", **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    p = Parameter(param)
    if grads[0].dtype != p.dtype:
        p.grad_dtype = grads[0].dtype
    optimizer = pysmooth.ClipSGD([p], **{"lr": 0.5, **kwargs}, backend=backend)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach(), optimizer.state[p].get("momentum_buffer")


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


# ---- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coef", [1.0, -1.0, 0.5, 1 / 3, 0.999, 1e-3, 1e3, 1e-39, 0.0, math.nan])
def test_scale_of_every_16_bit_value(isa: str, dtype: torch.dtype, coef: float) -> None:
    values = every_pattern(dtype)
    expected = bits((values.float() * torch.tensor(coef)).to(dtype))
    for skip in (0, 1, 7):  # each value in a vector, in a tail, at another address
        assert torch.equal(bits(scaled(values[skip:].clone(), coef)), expected[skip:])
    assert torch.equal(bits(scaled(with_gap(values), coef)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_survive_a_step_of_zero(isa: str, dtype: torch.dtype) -> None:
    values = every_pattern(dtype)
    for start in (values.clone(), with_gap(values), values[3:].clone()):
        expected = bits(start.clone())
        after, _ = steps(start, [torch.zeros_like(start)], lr=0.0)
        assert torch.equal(bits(after), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stores_round_like_torch(isa: str, dtype: torch.dtype) -> None:
    exact = every_pattern(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    middle = (exact[1:] + exact[:-1]) / 2  # ties, the hardest case: to even
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest, -largest]).mul(1 + torch.finfo(dtype).eps / 4)
    values = torch.cat(
        [
            middle,
            torch.nextafter(middle, torch.tensor(math.inf)),
            torch.nextafter(middle, torch.tensor(-math.inf)),
            torch.randint(-(2**31), 2**31, (100_003,)).to(torch.int32).view(torch.float32),
            beyond,
            torch.nextafter(beyond, torch.zeros(())),
            torch.tensor([math.inf, -math.inf, math.nan, 0.0]),
        ]
    )
    expected = bits(values.to(dtype))
    for laid in (lambda x: x, with_gap):
        # 0 - 1 * (-value); the bits of zero differ in sign only where the value is zero.
        stored, _ = steps(
            laid(torch.zeros(len(values), dtype=dtype)), [laid(values)], lr=1.0, maximize=True
        )
        got = bits(stored)
        assert torch.equal(got[values != 0], expected[values != 0])


# ---- one element, wherever it is -----------------------------------------------------------------


@pytest.mark.parametrize("pair", SGD_PAIRS, ids="-".join)
def test_result_does_not_depend_on_the_position(isa: str, pair: tuple[str, str]) -> None:
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "dampening": 0.0}
    p = torch.randn(4 * 64 + 3).to(DTYPES[pair[0]])
    grads = [torch.randn(len(p)).to(DTYPES[pair[1]]) for _ in range(2)]
    whole, buffer = steps(p.clone(), grads, **settings)
    assert buffer is not None
    for cut in [slice(k, None) for k in range(1, 70)] + [slice(None, n) for n in range(1, 259)]:
        part, m = steps(p[cut].clone(), [g[cut].clone() for g in grads], **settings)
        assert m is not None
        assert torch.equal(part, whole[cut]), cut
        assert torch.equal(m, buffer[cut]), cut
    spread, m = steps(with_gap(p), [with_gap(g) for g in grads], **settings)
    assert m is not None
    assert torch.equal(spread, whole)
    assert torch.equal(m, buffer)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("n", [32767, 32768, 32769, 3 * 32768 + 5])
def test_chunk_borders(isa: str, n: int, dtype: torch.dtype) -> None:
    # Quarters of small integers: exact in every dtype, so one wrong element is a difference.
    p, first, second = (torch.randint(-4, 5, (n,)).to(dtype) / 4 for _ in range(3))
    settings = {"momentum": 0.5, "max_norm": math.inf}
    after, buffer = steps(p.clone(), [first, second], **settings)
    momentum = 0.5 * first.float() + second.float()
    assert buffer is not None
    assert torch.equal(buffer.float(), momentum)
    exact = (p.float() - 0.5 * first.float()).to(dtype).float() - 0.5 * momentum
    assert torch.equal(after, exact.to(dtype))


# ---- rules and dtypes ----------------------------------------------------------------------------


def test_rules_name_their_dtypes_completely() -> None:
    for rule in _cpu.rules():
        assert {d for pair in rule["dtypes"] for d in pair} == set(DTYPES)
        assert all((d, d) in rule["dtypes"] for d in DTYPES)
        assert len(set(rule["dtypes"])) == len(rule["dtypes"])
        assert len(set(rule["hyper"])) == len(rule["hyper"])


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
@pytest.mark.parametrize("pair", SGD_PAIRS, ids="-".join)
def test_published_pairs_agree_with_the_reference(
    isa: str, pair: tuple[str, str], hyper: dict[str, Any]
) -> None:
    p = torch.randn(1001).to(DTYPES[pair[0]])
    grads = [torch.randn(1001).to(DTYPES[pair[1]]) for _ in range(3)]
    ours, m = steps(p.clone(), grads, "cpu", **hyper)
    theirs, n = steps(p.clone(), grads, "eager", **hyper)
    narrow = pair[0] in ("bfloat16", "float16")
    eps = torch.finfo(DTYPES[pair[0]]).eps
    if "float64" in pair and "max_norm" in hyper and hyper.get("clip") != "value":
        eps = max(eps, torch.finfo(DTYPES[pair[1]]).eps)  # eager takes a float32 norm of float32
    # At most one 16-bit rounding goes the other way; wider results differ by float32 rounding.
    torch.testing.assert_close(ours, theirs, rtol=(2 if narrow else 8) * eps, atol=8 * eps)
    if m is not None and n is not None:
        wide = (
            torch.finfo(m.dtype).eps if "max_norm" not in hyper else torch.finfo(torch.float32).eps
        )
        torch.testing.assert_close(m, n, rtol=0, atol=max(8 * wide, eps if narrow else 0))


UNPUBLISHED = sorted(set(itertools.product(DTYPES, DTYPES)) - set(SGD_PAIRS))


@pytest.mark.parametrize("pair", UNPUBLISHED, ids="-".join)
def test_unpublished_pairs_change_nothing(pair: tuple[str, str]) -> None:
    good, bad = Parameter(torch.ones(5)), Parameter(torch.ones(5, dtype=DTYPES[pair[0]]))
    bad.grad_dtype = DTYPES[pair[1]]
    good.grad, bad.grad = torch.ones(5), torch.ones(5, dtype=DTYPES[pair[1]])
    optimizer = pysmooth.ClipSGD([("a", good), ("b", bad)], 0.5, momentum=0.9, backend="cpu")
    with pytest.raises(TypeError, match=f"'b' has dtype {pair[1]} and its parameter {pair[0]}"):
        optimizer.step()
    assert torch.equal(good, torch.ones(5))
    assert torch.equal(bad, torch.ones(5, dtype=bad.dtype))
    assert not optimizer.state


def test_unpublished_pairs_exist() -> None:
    # Else the test above would be empty, and say nothing.
    assert ("float32", "float64") in UNPUBLISHED
    assert ("bfloat16", "float16") in UNPUBLISHED


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("coef", [0.0, 0.5, -3.0, 1 / 3, math.inf, math.nan])
def test_scale(isa: str, dtype: torch.dtype, coef: float) -> None:
    for n in (1, 5, 64, 67, 33_000):
        x = torch.randn(n).to(dtype)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        expected = bits((x.to(compute) * torch.tensor(coef, dtype=compute)).to(dtype))
        assert torch.equal(bits(scaled(with_gap(x), coef)), expected)
        assert torch.equal(bits(scaled(x, coef)), expected)


@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 3, 15, 16, 17, 63, 64, 65, 129, 1000, 33_000]), max_size=6
    ),
    pairs=st.lists(st.sampled_from(SGD_PAIRS), min_size=6, max_size=6),
    hyper=st.sampled_from(HYPERS),
    missing=st.sets(st.integers(0, 5), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_lists_of_any_sizes_and_dtypes(
    sizes: list[int],
    pairs: list[tuple[str, str]],
    hyper: dict[str, Any],
    missing: set[int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def run(backend: str) -> list[Tensor]:
        generator.manual_seed(seed)
        params = []
        for n, (p_dtype, g_dtype) in zip(sizes, pairs, strict=False):
            p = Parameter(torch.randn(n, generator=generator).to(DTYPES[p_dtype]))
            p.grad_dtype = DTYPES[g_dtype]
            params.append(p)
        held = params or [Parameter(torch.zeros(1))]
        optimizer = pysmooth.ClipSGD(held, 0.5, **hyper, backend=backend)
        for _ in range(2):
            for i, p in enumerate(params):
                assert p.grad_dtype is not None
                grad = torch.randn(p.shape, generator=generator).to(p.grad_dtype)
                p.grad = None if i in missing else grad
            optimizer.step()
        return [p.detach() for p in params]

    for ours, theirs, pair in zip(run("cpu"), run("eager"), pairs, strict=False):
        eps = max(torch.finfo(DTYPES[pair[0]]).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=16 * eps)


# ---- the native module's own doors ---------------------------------------------------------------


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _cpu.isa()
    with pytest.raises(ValueError, match=r"isa 'mmx'.*levels: baseline, avx2, avx512"):
        _cpu.set_isa("mmx")
    assert _cpu.isa() == before
    assert before in _cpu.isa_levels()
    assert _cpu.isa_levels()[0] == "baseline"


def plan(**changes: Any) -> _cpu.Plan:
    arguments: dict[str, Any] = {
        "params": [torch.zeros(3)],
        "state_dicts": [{}],
        "state_keys": [()],
        "rules": ["sgd"],
        "groups": [0],
        "names": ["w"],
        "first": [False],
        "state_roots": [],
        "scope": 0,
        "policy": 0,
        "norm_type": 2.0,
        "stage_scopes": [],
        "low_states": [0],
        "param_storage": [0],
        "by_rows": [False],
        "sums": [None],
        "absorbs": False,
        "select": None,
    }
    return _cpu.Plan(**{**arguments, **changes})


def test_plan_checks_what_it_is_given() -> None:
    plan()
    for key in ("state_dicts", "state_keys", "rules", "groups", "names", "first"):
        with pytest.raises(ValueError, match="as long as params"):
            plan(**{key: []})
    with pytest.raises(ValueError, match="rule 'unheard' is not known"):
        plan(rules=["unheard"])
    with pytest.raises(ValueError, match="rule 'sgd_momentum' has 1 states, not 0"):
        plan(rules=["sgd_momentum"])
    with pytest.raises(ValueError, match="negative"):
        plan(groups=[-1])
    with pytest.raises(TypeError, match="parameter 'w' is not a tensor"):
        plan(params=["w"])
    with pytest.raises(TypeError, match="must hold dicts"):
        plan(state_dicts=[[]])


def test_fill_zero_reaches_every_byte() -> None:
    for n in (0, 1, 1000, (9 << 20) + 3):  # huge pages, several pieces, an odd rest
        x = torch.full((n,), math.nan)
        _cpu.fill_zero([x], 2)
        assert torch.count_nonzero(x) == 0


def test_probes_do_what_their_time_is_taken_for() -> None:
    source, target = torch.randn(300_001), torch.zeros(300_001)
    probe.copy(target, source)
    assert torch.equal(target, source)
    probe.mix([target], [source])
    torch.testing.assert_close(target, source)
    with pytest.raises(ValueError, match="one size"):
        probe.copy(target, torch.zeros(3))
    with pytest.raises(ValueError, match="contiguous"):
        probe.mix([torch.zeros(3, 3)], [])
    with pytest.raises(ValueError, match="at most 3 tensors"):
        probe.mix([], [])
