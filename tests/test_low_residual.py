"""EFSGD with a bfloat16 residual: what is sent is taken from what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from battery import (
    SHAPES,
    advance,
    assert_same_snapshot,
    every_backend,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from rounding import is_neighbour

from pysmooth import EFSGD, HardThreshold, Identity, RandK, ScaledSign, TopK, _cpu
from pysmooth.compressors import QSGD, Compressor
from pysmooth.reference.compress import top_k

LOW: dict[str, Any] = {"residual": "bf16"}
SELECTING = {
    "top-k": TopK(ratio=0.1),
    "rand-k": RandK(ratio=0.1, scaled=False, seed=3),
    "threshold": HardThreshold(0.1),
    "identity": Identity(),
}
ALL = {
    **SELECTING,
    "top-k-global": TopK(k=50, scope="global"),
    "top-k-block": TopK(ratio=0.1, scope="block", block_size=64),
    "rand-k-scaled": RandK(ratio=0.5, scaled=True, seed=4),
    "sign": ScaledSign(),
}
FULL = [s for s in SHAPES if 0 not in s]


def named(compressors: dict[str, Compressor]) -> Any:
    return pytest.mark.parametrize("compressor", compressors.values(), ids=compressors.keys())


@every_backend
@named(SELECTING)
def test_sent_and_kept_are_what_was_stored(compressor: Compressor, backend: str) -> None:
    """From p = 0 a step leaves -c: c + e' is a bfloat16 number next to e + lr * g, to the bit."""
    (p,) = make_params([(3000,)])
    optimizer = EFSGD([p], 0.5, compressor, backend=backend, **LOW)
    for row in record_grads([p], 6):
        p.data.zero_()
        exact = optimizer.residual(p) + 0.5 * row[0].float()
        advance(optimizer, [p], [row])
        sent, kept = -p.detach(), optimizer.state[p]["residual"]
        assert kept.dtype == torch.bfloat16
        stored = sent + kept.float()
        assert is_neighbour(stored, exact)
        assert not torch.equal(stored, exact)
        if isinstance(compressor, TopK):
            assert torch.equal(sent, top_k(stored, 300))
        if isinstance(compressor, HardThreshold):
            assert torch.equal(sent, torch.where(stored.abs() >= 0.1, stored, 0.0))


@every_backend
def test_the_sign_and_its_scale_are_of_what_was_stored(backend: str) -> None:
    (p,) = make_params([(3000,)])
    optimizer = EFSGD([p], 0.5, ScaledSign(), backend=backend, **LOW)
    for row in record_grads([p], 6):
        p.data.zero_()
        exact = optimizer.residual(p) + 0.5 * row[0].float()
        advance(optimizer, [p], [row])
        v, scale = optimizer.state[p]["compressor_input"], optimizer.state[p]["scale"]
        assert v.dtype == torch.bfloat16
        assert is_neighbour(v, exact)
        assert float(scale) == pytest.approx(float(v.double().abs().mean()), rel=1e-6)
        assert torch.equal(-p.detach(), torch.where(v >= 0, 1.0, -1.0) * scale.float())
        assert torch.equal(optimizer.residual(p), v.float() + p.detach())


@named({name: c for name, c in ALL.items() if name != "sign"})
@pytest.mark.parametrize("precision", ["float32", "kahan", "stochastic_rounding"])
def test_kernels_and_eager_have_the_same_bits(compressor: Compressor, precision: str) -> None:
    results = []
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    for backend in ("cpu", "eager"):
        params = make_params([*FULL, (70, 31)], dtype)
        params[-1].data = params[-1].data.t().contiguous().t()
        more = {} if precision == "float32" else {precision: True}
        optimizer = EFSGD(
            params, 0.5, compressor, momentum=0.5, weight_decay=0.1, backend=backend, **LOW, **more
        )
        advance(optimizer, params, record_grads(params, 4))
        results.append(snapshot(optimizer))
    assert_same_snapshot(*results)


def test_scaled_signs_differ_by_a_sum() -> None:
    """Of the first step's residual no bit: the scale enters later."""
    results = []
    for backend in ("cpu", "eager"):
        params = make_params(FULL)
        optimizer = EFSGD(params, 0.5, ScaledSign(), backend=backend, **LOW)
        rows = record_grads(params, 4)
        advance(optimizer, params, rows[:1])
        first = [optimizer.state[p]["compressor_input"].clone() for p in params]
        advance(optimizer, params, rows[1:])
        results.append((first, [p.detach().clone() for p in params]))
    for x, y in zip(*(r[0] for r in results), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(*(r[1] for r in results), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@every_backend
def test_the_mean_is_right(backend: str) -> None:
    """Nothing is sent, and 2^-12 is added to 1: to nearest it would stay 1."""
    p = torch.nn.Parameter(torch.zeros(4000))
    optimizer = EFSGD([p], 1.0, HardThreshold(100.0), backend=backend, **LOW)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for _ in range(200):
        p.grad = torch.full_like(p, 2.0**-12)
        optimizer.step()
    found = optimizer.residual(p)
    assert len(found.unique()) > 5
    # 200 roundings, each of variance below 2^-7 * 2^-12.
    spread = (200 * 2**-19) ** 0.5
    assert float(found.mean()) == pytest.approx(1 + 200 * 2**-12, abs=5 * spread / 4000**0.5)


@named(ALL)
@pytest.mark.parametrize("isa", _cpu.isa_levels())
def test_any_vector_width_thread_count_and_layout(compressor: Compressor, isa: str) -> None:
    results = []
    for threads in (None, 1, 3):
        params = make_params([*SHAPES, (300, 250)])
        optimizer = EFSGD(params, 0.5, compressor, momentum=0.5, backend="cpu", **LOW)
        before = _cpu.isa(), torch.get_num_threads()
        try:
            if threads is not None:
                _cpu.set_isa(isa)
                torch.set_num_threads(threads)
            for row in record_grads(params, 3):
                if threads == 3:
                    row[-1] = row[-1].t().contiguous().t()
                set_grads(params, row)
                optimizer.step()
        finally:
            _cpu.set_isa(before[0])
            torch.set_num_threads(before[1])
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_same_snapshot(results[0], other)


@every_backend
@named(ALL)
def test_resumes_with_the_same_bits(compressor: Compressor, backend: str) -> None:
    params = make_params(dtype=torch.bfloat16)
    rows = record_grads(params, 6)
    optimizer = EFSGD(params, 0.5, compressor, backend=backend, **LOW)
    advance(optimizer, params, rows[:3])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = EFSGD(copies, 0.5, compressor, backend=backend)  # the option comes with the group
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(optimizer, params, rows[3:])
    advance(other, copies, rows[3:])
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


@every_backend
@named({**SELECTING, "sign": ScaledSign()})
def test_parameter_minus_residual_follows_sgd(compressor: Compressor, backend: str) -> None:
    """To the noise: 2^-8 of the residual in every step, which adds up like a random walk."""
    params, plain = make_params([(5003,)]), make_params([(5003,)])
    rows = record_grads(params, 30)
    optimizer = EFSGD(params, 0.1, compressor, backend=backend, **LOW)
    advance(optimizer, params, rows)
    advance(torch.optim.SGD(plain, 0.1), plain, rows)
    gap = params[0].detach() - optimizer.residual(params[0]) - plain[0].detach()
    assert 0 < float(gap.abs().max()) < 30 * 2**-7
    assert float(gap.mean()) == pytest.approx(0, abs=1e-3)


def test_compressors_without_a_kernel() -> None:
    params = make_params([(50,)])
    optimizer = EFSGD(params, 0.1, QSGD(4), backend="eager", **LOW)
    advance(optimizer, params, record_grads(params, 3))
    assert optimizer.state[params[0]]["residual"].dtype == torch.bfloat16
    assert optimizer.residual(params[0]).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "residual", "message"),
    [
        (torch.float32, "bfloat16", "residual must be one of fp32, bf16; got 'bfloat16'"),
        (torch.float32, torch.bfloat16, "residual must be one of fp32, bf16"),
        (torch.float64, "bf16", "residual='bf16' does not go with torch.float64 parameters"),
        (torch.complex64, "bf16", "residual='bf16' does not go with complex parameters"),
    ],
)
def test_refused(dtype: torch.dtype, residual: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EFSGD(make_params([(3,)], dtype), 0.1, TopK(k=1), residual=residual)


@every_backend
def test_a_residual_of_the_wrong_precision_is_refused(backend: str) -> None:
    params = make_params([(30,)])
    optimizer = EFSGD(params, 0.1, TopK(k=3), backend=backend)
    rows = record_grads(params, 2)
    advance(optimizer, params, rows[:1])
    optimizer.param_groups[0]["residual"] = "bf16"
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'residual'.* has dtype .*float32, expected .*bfloat16"):
        advance(optimizer, params, rows[1:])
    assert_same_snapshot(snapshot(optimizer), before)
