"""Chains of parts: fused where a kernel computes them, part by part in torch, clearly refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import advance, make_params, record_grads, same_bits, set_grads, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pysmooth
from pysmooth import chain, compose
from pysmooth import parts as p
from pysmooth.composition import ComposedOptimizer, fused_table
from pysmooth.compressors import (
    QSGD,
    Compressor,
    HardThreshold,
    Identity,
    NaturalCompression,
    RandK,
    ScaledSign,
    TopK,
)

CLIP = p.Clip(1.0)
SPARSE = TopK(ratio=0.05)

# At least one chain for every row of the table and every way through it, with the class it becomes.
FUSED: dict[str, tuple[tuple[p.Part, ...], type]] = {
    "nothing": ((), pysmooth.ClipSGD),
    "clip": ((CLIP,), pysmooth.ClipSGD),
    "smooth": ((p.Clip(2.0, "smooth", scope="tensor"), p.Momentum(0.5)), pysmooth.ClipSGD),
    "value": ((p.Clip(0.5, "value"), p.Momentum(0.9, nesterov=True)), pysmooth.ClipSGD),
    "l1": ((p.Clip(1.0, norm_type=1.0, scope="group"),), pysmooth.ClipSGD),
    "agc": ((p.AdaptiveClip(), p.Momentum(0.9, dampening=0.3)), pysmooth.ClipSGD),
    "coupled": ((CLIP, p.Decay(0.1), p.Momentum()), pysmooth.ClipSGD),
    "decoupled": ((p.Momentum(), p.Decay(0.1, decoupled=True)), pysmooth.ClipSGD),
    "adam": ((CLIP, p.Decay(1e-4), p.ScaleByAdam()), pysmooth.Adam),
    "adamw": ((CLIP, p.ScaleByAdam(amsgrad=True), p.Decay(0.1, True)), pysmooth.AdamW),
    "adagrad": ((CLIP, p.Decay(1e-4), p.ScaleByAdagrad(0.1, 0.1)), pysmooth.Adagrad),
    "norm": ((CLIP, p.ScaleByNorm(0.5, reweight=0.5)), pysmooth.MAdagradNorm),
    "m norm": ((p.ScaleByNorm(0.5, beta1=0.9, scope="tensor"),), pysmooth.MAdagradNorm),
    "adam norm": (
        (p.Clip(1.0), p.ScaleByNorm(0.5, beta1=0.9, beta2=0.99), p.Decay(0.1, True)),
        pysmooth.AdamNorm,
    ),
    "delayed": ((CLIP, p.ScaleByNorm(0.5, delayed=True)), pysmooth.MAdagradNorm),
    "coordinates": (
        (p.Clip(0.5, "value"), p.ScaleByNorm(0.1, coordinate_wise=True, beta1=0.5)),
        pysmooth.MAdagradNorm,
    ),
    "sign": ((CLIP, p.Sign()), pysmooth.SignSGD),
    "signum": ((p.Average(0.9), p.Sign(scaled=True), p.Decay(0.1, True)), pysmooth.SignSGD),
    "lion": ((CLIP, p.ScaleByLion(), p.Decay(0.1, True)), pysmooth.Lion),
    "normalized": ((CLIP, p.Average(0.9, "first"), p.Normalize()), pysmooth.NormalizedSGD),
    "normalize": ((p.Normalize(1e-3, scope="tensor"),), pysmooth.NormalizedSGD),
    "ef": ((p.Decay(0.01), p.Momentum(), p.Compress(HardThreshold(0.0123))), pysmooth.EFSGD),
    "ef top-k": ((p.Compress(SPARSE),), pysmooth.EFSGD),
    "ef rand-k": ((p.Compress(RandK(ratio=0.1, scaled=False, seed=3)),), pysmooth.EFSGD),
    "ef sign": ((p.Momentum(0.5), p.Compress(ScaledSign())), pysmooth.EFSGD),
    "ef natural": ((p.Momentum(0.5), p.Compress(NaturalCompression(seed=1))), pysmooth.EFSGD),
    "clip ef": (
        (p.Clip(1.0, "smooth", scope="tensor"), p.Decay(0.01), p.Momentum(), p.Compress(SPARSE)),
        pysmooth.EFSGD,
    ),
    "agc ef": ((p.AdaptiveClip(), p.Compress(ScaledSign())), pysmooth.EFSGD),
    "value ef": ((p.Clip(0.5, "value"), p.Compress(HardThreshold(0.0123))), pysmooth.EFSGD),
    "ef21 qsgd": ((p.Compress(QSGD(256, seed=1), "ef21"),), pysmooth.EF21),
    "ef21": ((p.Compress(SPARSE, "ef21"), p.Decay(0.1, True)), pysmooth.EF21),
    "ef21 full": ((p.Compress(SPARSE, "ef21", "first"),), pysmooth.EF21),
    "ef21 sgdm": ((p.Average(0.7, "first"), p.Compress(SPARSE, "ef21")), pysmooth.EF21),
    "ef21 zero": ((p.Average(0.7), p.Compress(ScaledSign(), "ef21")), pysmooth.EF21),
    "norm ef21": (
        (p.Average(0.7, "first"), p.Compress(SPARSE, "ef21", "first"), p.Normalize(scope="group")),
        pysmooth.EF21,
    ),
    "ef21 2m": (
        (p.Average(0.7, "first"), p.Average(0.7, "first"), p.Compress(Identity(), "ef21")),
        pysmooth.EF21SGD2M,
    ),
    "clip21": ((p.ClipDifference(2.0),), pysmooth.Clip21),
    "clip21 2m": (
        (p.Average(0.9), p.ClipDifference(2.0, 0.5, scope="tensor")),
        pysmooth.Clip21SGD2M,
    ),
}
every_chain = pytest.mark.parametrize(("parts", "named"), FUSED.values(), ids=FUSED)


@every_chain
def test_fused_and_part_by_part_agree(parts: tuple[p.Part, ...], named: type) -> None:
    a, b = make_params(), make_params()
    fused, eager = compose(a, chain(*parts), 0.1), compose(b, chain(*parts), 0.1, backend="eager")
    assert type(fused) is named
    assert fused.resolved_backend == "cpu"
    assert type(eager) is ComposedOptimizer
    rows = record_grads(a, 8)
    advance(fused, a, rows)
    advance(eager, b, rows)
    for x, y in zip(a, b, strict=True):
        close = torch.isclose(x.detach(), y.detach(), rtol=2e-5, atol=2e-6)
        # Of equal or nearly equal values a sum of another rounding may choose, or sign, others.
        assert close.float().mean() > 0.995 or x.numel() == 0
        # The same states, under the same names; NormalizedSGD has a momentum of 0 as well.
        extra = fused.state[x].keys() ^ eager.state[y].keys()
        idle = bool(parts) and isinstance(parts[0], p.Normalize)
        assert extra == ({"momentum_buffer"} if idle else set())
    assert not same_bits(a[4].detach(), make_params()[4].detach())


@every_chain
@pytest.mark.parametrize("forward", [True, False])
def test_checkpoints_move_between_both(
    parts: tuple[p.Part, ...], named: type, forward: bool
) -> None:
    a = make_params()
    rows = record_grads(a, 6)
    names = ("cpu", "eager") if forward else ("eager", "cpu")
    first = compose(a, chain(*parts), 0.1, backend=names[0])  # type: ignore[arg-type]
    advance(first, a, rows[:3])
    b = [torch.nn.Parameter(x.detach().clone()) for x in a]
    second = compose(b, chain(*parts), 0.1, backend=names[1])  # type: ignore[arg-type]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    advance(first, a, rows[3:])
    advance(second, b, rows[3:])
    for x, y in zip(a, b, strict=True):
        close = torch.isclose(x.detach(), y.detach(), rtol=2e-5, atol=2e-6)
        assert close.float().mean() > 0.995 or x.numel() == 0


def test_every_row_of_the_table_is_examined() -> None:
    seen = {named.__name__ for _, named in FUSED.values()}
    for _, names in fused_table():
        assert seen & set(names.split(", ")), names


def test_the_table_of_the_docs() -> None:
    page = Path(__file__).parents[1] / "docs" / "methods" / "composition.md"
    rows = re.findall(r"^\| `([^`]*)` \| (.*) \|$", page.read_text(), re.MULTILINE)
    assert [(a, b.replace("`", "")) for a, b in rows] == fused_table()


# ---- any chain ----------------------------------------------------------------------------------

PARTS = [
    *(p.Clip(1.0), p.Clip(0.5, "value"), p.Clip(1.0, "normalize", scope="tensor")),
    *(p.AdaptiveClip(), p.Momentum(), p.Average(), p.Average(0.5, "first"), p.ScaleByAdam()),
    *(p.ScaleByAdagrad(), p.ScaleByNorm(0.5), p.ScaleByNorm(0.5, coordinate_wise=True)),
    *(p.Sign(), p.Sign(scaled=True), p.ScaleByLion(), p.Normalize(), p.ClipDifference()),
    *(p.Compress(SPARSE), p.Compress(QSGD(4)), p.Compress(ScaledSign()), p.Decay(0.1)),
    *(p.Compress(SPARSE, "ef21"), p.Compress(SPARSE, "none"), p.Decay(0.1, decoupled=True)),
]


@settings(max_examples=120)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=4))
def test_random_chains(parts: list[p.Part]) -> None:
    """Part by part everything runs; fused it is the same, or refused with a clear message."""
    a, b = make_params([(7, 5), (33,), ()]), make_params([(7, 5), (33,), ()])
    rows = record_grads(a, 3)
    eager = compose(a, chain(*parts), 0.01, backend="eager")
    advance(eager, a, rows)
    assert all(x.isfinite().all() for x in a)
    message = ""
    try:
        fused = compose(b, chain(*parts), 0.01)
    except pysmooth.BackendError as error:
        message = str(error)
    if message:
        assert f"no kernel computes {chain(*parts)}. Nearest:" in message
        assert re.search(r"part \d, \w+|missing at the end", message)
        assert "backend='eager' runs any chain" in message
        return
    advance(fused, b, rows)
    for x, y in zip(a, b, strict=True):
        close = torch.isclose(x.detach(), y.detach(), rtol=2e-5, atol=2e-6)
        assert close.float().mean() > 0.9


def test_parts_run_in_their_order() -> None:
    (x,) = make_params([(4,)])
    start, grad = x.detach().clone(), torch.tensor([3.0, -4.0, 0.0, 0.0])
    parts = (p.Decay(0.5), p.Clip(1.0, eps=0.0), p.Decay(2.0), p.Sign())
    optimizer = compose([x], chain(*parts), 0.1, backend="eager")
    x.grad = grad
    optimizer.step()
    u = grad + 0.5 * start
    u = u * min(1.0, 1.0 / float(u.norm())) + 2.0 * start
    torch.testing.assert_close(x.detach(), start - 0.1 * torch.sign(u))


def test_a_state_that_two_parts_have() -> None:
    (x,) = make_params([(4,)])
    parts = (p.Momentum(0.5), p.Average(0.5), p.Momentum(0.9))
    optimizer = compose([x], chain(*parts), 1.0, backend="eager")
    start = x.detach().clone()
    x.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(x.detach(), start - 0.5)  # 1, then 0.5, then 0.5
    keys = {"momentum_buffer", "second_momentum_buffer", "third_momentum_buffer"}
    assert optimizer.state[x].keys() == keys


def test_what_follows_error_feedback_is_in_units_of_the_gradient() -> None:
    (x,) = make_params([(4,)])
    start = x.detach().clone()
    parts = (p.Compress(Identity()), p.Clip(1.0, eps=0.0))
    optimizer = compose([x], chain(*parts), 0.1, backend="eager")
    x.grad = torch.tensor([0.0, 5.0, 0.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(x.detach(), start - torch.tensor([0.0, 0.1, 0.0, 0.0]))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(x.detach(), start - torch.tensor([0.0, 0.1, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["agc", "coupled", "adam", "m norm", "ef", "ef21 sgdm"])
def test_every_dtype(dtype: torch.dtype, name: str) -> None:
    parts, _ = FUSED[name]
    a, b = make_params(dtype=dtype), make_params(dtype=dtype)
    rows = record_grads(a, 4)
    advance(compose(a, chain(*parts), 0.01), a, rows)
    advance(compose(b, chain(*parts), 0.01, backend="eager"), b, rows)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    for x, y in zip(a, b, strict=True):
        close = torch.isclose(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)
        assert close.float().mean() > 0.99 or x.numel() == 0


# ---- a torch optimizer like the others ----------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    a = make_params()
    rows = record_grads(a, 4)
    parts = (p.Clip(1.0), p.Sign(), p.Momentum(), p.Compress(SPARSE), p.Decay(0.1, True))
    optimizer = compose(a, chain(*parts), 0.1, backend="eager")
    advance(optimizer, a, rows[:2])
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    b = [x for group in other.param_groups for x in group["params"]]
    advance(optimizer, a, rows[2:])
    advance(other, b, rows[2:])
    assert all(same_bits(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_groups_maximize_and_scaled_gradients(backend: Any) -> None:
    def run(scale: float) -> list[Tensor]:
        a = make_params([(5, 3), (4,)])
        groups = [{"params": a[:1], "lr": 0.5}, {"params": a[1:]}]
        made = compose(groups, chain(CLIP, p.Momentum()), 0.1, maximize=True, backend=backend)
        for row in record_grads(a, 2):
            set_grads(a, [scale * g for g in row])
            made.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            made.step()
        return [x.detach() for x in a]

    assert all(same_bits(x, y) for x, y in zip(run(1.0), run(1024.0), strict=True))
    (up,) = make_params([(4,)])
    before = up.detach().clone()
    made = compose([up], chain(p.Momentum()), 0.1, maximize=True, backend=backend)
    up.grad = torch.ones(4)
    made.step()
    torch.testing.assert_close(up.detach(), before + 0.1)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_policies(backend: Any) -> None:
    (x,) = make_params([(4,)])
    for parts, default in [((CLIP,), "propagate"), ((p.Compress(SPARSE),), "skip")]:
        made = compose([x], chain(*parts), 0.1, backend=backend)
        assert made.policy.name.lower() == default
    with pytest.raises(ValueError, match="nonfinite must be one of skip, raise, zero"):
        compose([x], chain(p.Compress(SPARSE)), 0.1, nonfinite="propagate", backend=backend)
    made = compose([x], chain(CLIP, p.Momentum()), 0.1, nonfinite="skip", backend=backend)
    before = snapshot(made)
    x.grad = torch.tensor([1.0, math.nan, 0.0, 0.0])
    made.step()
    assert same_bits(before[0][0], x.detach())
    assert made.skipped_steps() == 1
    assert not made.state.get(x)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_norms_in_backward(policy: str) -> None:
    """The clip's norm comes from backward, with the bits of the ordinary path."""
    for parts in [(CLIP, p.Momentum()), (CLIP, p.Compress(SPARSE)), (CLIP, p.ScaleByAdam())]:
        found = []
        for norm in ("in_step", "in_backward"):
            a = make_params()
            made = compose(a, chain(*parts), 0.1, norm=norm, nonfinite=policy)  # type: ignore[arg-type]
            for row in record_grads(a, 3):
                made.zero_grad()
                torch.autograd.backward(
                    [(x * g.to(x.dtype)).sum() for x, g in zip(a, row, strict=True)]
                )
                made.step()
            assert made.sums_from_backward() == (0 if norm == "in_step" else len(a) - 1)
            found.append([x.detach() for x in a])
        assert all(same_bits(x, y) for x, y in zip(*found, strict=True))


def test_norms_in_backward_part_by_part_are_taken_in_the_step() -> None:
    a = make_params([(4,)])
    made = compose(a, chain(CLIP, p.Sign(), p.Momentum()), 0.1, norm="in_backward", backend="eager")
    a[0].sum().backward()
    made.step()
    assert made.sums_from_backward() == 0
    with pytest.raises(ValueError, match="norm must be one of in_step, in_backward"):
        compose(a, chain(), 0.1, norm="before", backend="eager")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm='in_backward' has nothing to do"):
        compose(a, chain(p.Momentum()), 0.1, norm="in_backward")


# ---- clear errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((p.Momentum(), CLIP), r"part 2, Clip, is in the way: nothing can follow"),
        ((CLIP, p.Sign(), p.ScaleByAdam()), r"part 3, ScaleByAdam, is in the way: nothing can"),
        ((CLIP, p.Compress(SPARSE, "ef21")), r"part 2, Compress: its feedback is 'ef21'"),
        ((p.Average(), CLIP, p.Compress(SPARSE)), r"part 2, Clip, is in the way of Compress"),
        ((CLIP, p.ClipDifference()), r"part 1, Clip, is in the way of ClipDifference"),
        ((p.Compress(Compressor()),), r"part 1, Compress: Compressor has no kernel"),
        (
            (p.Average(0.9, "first"), p.Sign()),
            r"part 1, Average: it starts from 'first'",
        ),
        ((p.ScaleByAdagrad(), p.Decay(0.1, True)), r"part 2, Decay, is in the way"),
        ((p.Decay(0.1), p.ScaleByAdam(), p.Decay(0.1, True)), r"part 3, Decay, .*another decay"),
        ((p.Clip(1.0, scope="tensor"), p.Normalize()), r"part 1, Clip: its scope is 'tensor'"),
        ((p.Average(),), r"ClipDifference is missing at the end"),
        ((p.Average(0.5), p.Compress(SPARSE, "ef21", "first")), r"part 2, Compress: it starts"),
        ((p.Decay(0.1, True), p.Decay(0.1), p.ScaleByAdam()), r"part 2, Decay, .*another decay"),
        ((p.Clip(1.0, norm_type=1.0), p.ScaleByNorm(0.5)), r"part 1, Clip: its norm is not Eucl"),
        ((p.Clip(1.0, "value"), p.ScaleByNorm(0.5)), r"part 1, Clip: mode='value' goes with"),
        ((p.Momentum(0.9, nesterov=True), p.Compress(SPARSE)), r"part 1, Momentum: .*no nesterov"),
        ((p.Momentum(1.0), p.Compress(SPARSE)), r"part 1, Momentum: .*not less than 1"),
        ((p.Compress(SPARSE, "ef21"), p.Normalize(eps=0.1)), r"part 2, Normalize: .*its eps is 0"),
        (
            (p.Average(0.9), p.Average(0.5), p.Compress(SPARSE, "ef21")),
            r"part 2, Average: it differs from the first",
        ),
    ],
)
def test_no_kernel(parts: tuple[p.Part, ...], message: str) -> None:
    params = make_params([(4,)])
    with pytest.raises(pysmooth.BackendError, match=message):
        compose(params, chain(*parts), 0.1)


def test_complex_numbers_have_no_coordinates_to_clamp() -> None:
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = compose([x], chain(p.Clip(1.0, "value")), 0.1, backend="eager")
    x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="no meaning for complex parameters"):
        optimizer.step()
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: p.Clip(0.0), "max_norm must be greater than 0"),
        (lambda: p.Clip(1.0, "soft"), "mode must be one of"),
        (lambda: p.Clip(1.0, scope="all"), "scope must be one of"),
        (lambda: p.Clip(math.inf, "normalize"), "max_norm must be finite for mode='normalize'"),
        (lambda: p.AdaptiveClip(-1.0), "factor must be greater than 0"),
        (lambda: p.Momentum(0.9, 0.1, nesterov=True), "nesterov needs dampening = 0"),
        (lambda: p.Average(1.0), r"decay must be in \[0, 1\)"),
        (lambda: p.ScaleByAdam((0.9, 1.0)), r"betas\[1\] must be less than 1"),
        (lambda: p.ScaleByNorm(0.0), "b_init must be greater than 0"),
        (lambda: p.Compress("top-k"), "compressor must be one of pysmooth.compressors"),
        (lambda: p.Compress(SPARSE, "ef", "first"), "start='first' goes with feedback='ef21'"),
        (lambda: p.ClipDifference(1.0, 2.0), r"beta_hat must be in \(0, 1\]"),
        (lambda: p.Decay(-0.1), "weight_decay must be at least 0"),
        (lambda: chain(p.Sign), "part 1 must be one of pysmooth.parts"),
        (lambda: chain(*[p.Momentum()] * 6), "room for five states"),
        (lambda: compose([torch.ones(1)], [p.Sign()], 0.1), "chain must be made by"),
        (lambda: compose(make_params([(1,)]), chain(), -0.1), "lr must be at least 0"),
        (lambda: ComposedOptimizer(make_params([(1,)]), chain(), 0.1, backend="cpu"), "backend"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
