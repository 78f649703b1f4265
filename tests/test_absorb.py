"""EFSGD(absorb=True): gradients go into the residual in backward, and are freed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from battery import (
    all_params,
    assert_same_bits,
    assert_same_snapshot,
    every_backend,
    make_params,
    record_grads,
    set_grads,
    snapshot,
)
from torch import Tensor

import pysmooth
from pysmooth import EFSGD
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

Params = list[torch.nn.Parameter]
COMPRESSORS = [
    TopK(ratio=0.1),
    TopK(k=9, scope="global"),
    TopK(ratio=0.1, scope="block", block_size=64),
    RandK(ratio=0.1, scaled=False, seed=3),
    ScaledSign(),
    ScaledSign(scope="global"),
    HardThreshold(0.0123),
    Identity(),
    QSGD(levels=4, seed=1),
    NaturalCompression(seed=1),
]
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


def backward(params: Params, row: list[Tensor | None], **kwargs: Any) -> None:
    """A backward pass that ends in these gradients."""
    terms = [(p * g.to(p.dtype)).sum() for p, g in zip(params, row, strict=True) if g is not None]
    torch.stack([t.real if t.is_complex() else t for t in terms]).sum().backward(**kwargs)


def pending(optimizer: EFSGD) -> list[int]:
    return [optimizer.state.get(p, {}).get("absorbed", 0) for p in all_params(optimizer)]


def without_count(snap: Any) -> Any:
    params, states = snap
    return params, [{k: v for k, v in s.items() if k != "absorbed"} for s in states]


def assert_same(absorbing: EFSGD, plain: EFSGD) -> None:
    """But for the count of absorbed gradients."""
    assert_same_snapshot(without_count(snapshot(absorbing)), snapshot(plain))


def compare(
    compressor: Compressor, backend: str, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> None:
    ours, expected = make_params(dtype=dtype), make_params(dtype=dtype)
    kwargs = {"lr": 0.1, "compressor": compressor, "backend": backend, **kwargs}
    optimizer, plain = EFSGD(ours, absorb=True, **kwargs), EFSGD(expected, **kwargs)
    for i, row in enumerate(record_grads(ours, 4)):
        part = [None if (i + k) % 5 == 0 else g for k, g in enumerate(row)]
        optimizer.zero_grad()
        plain.zero_grad()
        backward(ours, part)
        assert all(p.grad is None for p in ours)
        assert pending(optimizer) == [int(g is not None and g.numel() > 0) for g in part]
        backward(expected, part)
        optimizer.step()
        plain.step()
        assert not any(pending(optimizer))
        for o in (optimizer, plain):
            o.param_groups[0]["lr"] *= 0.5
    assert_same(optimizer, plain)
    assert not torch.equal(ours[4], make_params(dtype=dtype)[4])


# ---- the same bits ------------------------------------------------------------------------------


@every_backend
@every_compressor
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"weight_decay": 0.1, "maximize": True}, {"nonfinite": "zero"}, {"residual": "bf16"}],
    ids=["plain", "decay", "zero", "bf16"],
)
def test_one_backward_per_step_gives_the_same_bits(
    compressor: Compressor, kwargs: dict[str, Any], backend: str
) -> None:
    compare(compressor, backend, **kwargs)


@every_backend
@pytest.mark.parametrize("compressor", [TopK(ratio=0.1), ScaledSign()], ids=repr)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.complex64],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_dtypes(compressor: Compressor, dtype: torch.dtype, backend: str) -> None:
    compare(compressor, backend, dtype, weight_decay=0.1)


@every_backend
@pytest.mark.parametrize("how", ["master_weights", "kahan", "stochastic_rounding"])
def test_16_bit_parameters(how: str, backend: str) -> None:
    for compressor in (TopK(ratio=0.1), ScaledSign()):
        compare(compressor, backend, torch.bfloat16, weight_decay=0.1, **{how: True})


@every_backend
@pytest.mark.parametrize("compressor", [TopK(ratio=0.01), ScaledSign()], ids=repr)
def test_large_tensors_and_threads(compressor: Compressor, backend: str) -> None:
    gradient = torch.randn(300_007, generator=torch.Generator().manual_seed(0))
    found = []
    for absorb in (True, False):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = torch.nn.Parameter(torch.ones_like(gradient))
            optimizer = EFSGD([p], 0.1, compressor, absorb=absorb, backend=backend)
            for _ in range(3):
                optimizer.zero_grad()
                (p * gradient).sum().backward()
                optimizer.step()
            found.append(p)
    for other in found[1:]:
        assert_same_bits(found[:1], [other])


@every_backend
def test_layouts(backend: str) -> None:
    """A gradient in another order than its parameter, and a parameter in another than its state."""
    for compressor in (Identity(), ScaledSign()):
        found = []
        for absorb in (True, False):
            base = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
            ps = [
                torch.nn.Parameter(base.contiguous(memory_format=torch.channels_last)),
                torch.nn.Parameter(base.clone()[:, ::2]),
                torch.nn.Parameter(base.clone()),
            ]
            optimizer = EFSGD(ps, 0.1, compressor, absorb=absorb, backend=backend)
            for _ in range(2):
                for p in ps:
                    p.grad = (2 * p.detach()).transpose(0, 1).contiguous().transpose(0, 1)
                optimizer.step()
            found.append([p.detach().contiguous() for p in ps])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # sums in another order


# ---- memory -------------------------------------------------------------------------------------


@every_backend
def test_gradients_die_one_by_one(backend: str) -> None:
    """When a hook runs, no other gradient is alive."""
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(20)]
    optimizer = EFSGD(params, 0.1, ScaledSign(), absorb=True, backend=backend)
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def look(gradient: Tensor) -> None:
        alive.append(sum(r() is not None for r in seen))
        seen.append(weakref.ref(gradient))

    for p in params:
        # Tensor hooks run before accumulation: the gradient is made, the ones before are gone.
        p.register_hook(look)
    for _ in range(3):
        gc.collect()
        x = torch.ones(1000)
        for p in params:  # a chain: one gradient after the other
            x = torch.tanh(x * p)
        x.sum().backward()
        del x
        assert all(p.grad is None for p in params)
        optimizer.step()
        gc.collect()
    assert len(alive) == 60
    assert max(alive) <= 2
    assert not any(r() for r in seen)


# ---- accumulation -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("compressor", [Identity(), ScaledSign(), TopK(ratio=0.1)], ids=repr)
def test_several_backward_passes_add_up(compressor: Compressor, backend: str) -> None:
    """Against float64: the residual takes lr * g of each, weight decay once."""
    params = make_params([(40,), (3, 5)])
    optimizer = EFSGD(
        params, 0.1, compressor, weight_decay=0.5, absorb=True, backend=backend, maximize=True
    )
    rows = record_grads(params, 6)
    for i in range(0, 6, 3):
        before = [optimizer.residual(p).double() for p in params]
        start = [p.detach().double() for p in params]
        rates = (0.1, 0.1, 0.3)
        for lr, row in zip(rates, rows[i : i + 3], strict=True):
            optimizer.param_groups[0]["lr"] = lr
            backward(params, row)
        assert pending(optimizer) == [3, 3]
        for k, p in enumerate(params):
            want = before[k] + 0.1 * 0.5 * start[k]
            for lr, row in zip(rates, rows[i : i + 3], strict=True):
                want -= lr * row[k]
            torch.testing.assert_close(optimizer.residual(p).double(), want, rtol=1e-5, atol=1e-6)
        owed = [optimizer.residual(p) for p in params]
        optimizer.step()
        for k, p in enumerate(params):
            left = p.detach().double() - optimizer.residual(p).double()
            torch.testing.assert_close(left, start[k] - owed[k], rtol=1e-5, atol=1e-6)


@every_backend
def test_one_graph_backward_twice(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(40))
    optimizer = EFSGD([p], 0.5, Identity(), absorb=True, backend=backend)
    loss = (3 * p).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((40,), -3.0))


@every_backend
def test_a_step_that_is_left_out_comes_later(backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = EFSGD([p], 1.0, Identity(), absorb=True, backend=backend)
    (2 * p).sum().backward()
    p.sum().backward()
    optimizer.step()
    optimizer.step()  # nothing is left
    assert torch.equal(p.detach(), torch.full((4,), -3.0))
    assert float(optimizer.state[p]["step"]) == 1


@every_backend
@pytest.mark.parametrize("compressor", [Identity(), ScaledSign(), TopK(k=2)], ids=repr)
def test_lr_0(compressor: Compressor, backend: str) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = EFSGD([p], 0.0, compressor, absorb=True, backend=backend)
    p.sum().backward()
    optimizer.step()
    assert not p.any()
    assert not optimizer.residual(p).any()
    optimizer.param_groups[0]["lr"] = 1.0
    p.sum().backward()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # absorbed, and not sent
    assert not p.any()
    assert torch.equal(optimizer.residual(p), torch.ones(4))
    optimizer.param_groups[0]["lr"] = 1.0
    (0 * p).sum().backward()
    optimizer.step()
    assert float(p.detach().sum()) == (-2.0 if isinstance(compressor, TopK) else -4.0)


@every_backend
def test_closure(backend: str) -> None:
    ours, plain = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": ScaledSign(), "backend": backend}
    optimizer, reference = EFSGD(ours, absorb=True, **kwargs), EFSGD(plain, **kwargs)
    for row in record_grads(ours, 2):
        for params, o in ((ours, optimizer), (plain, reference)):

            def closure(params: Params = params, o: EFSGD = o, row: Any = row) -> float:
                o.zero_grad()
                backward(params, row)
                return 1.0

            assert o.step(closure) == 1.0
    assert_same(optimizer, reference)


@every_backend
def test_backward_on_another_thread(backend: str) -> None:
    ours, plain = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": TopK(ratio=0.1), "backend": backend}
    optimizer, reference = EFSGD(ours, absorb=True, **kwargs), EFSGD(plain, **kwargs)
    row = record_grads(ours, 1)[0]
    worker = threading.Thread(target=backward, args=(ours, row))
    worker.start()
    worker.join()
    backward(plain, row)
    optimizer.step()
    reference.step()
    assert_same(optimizer, reference)


# ---- what is not finite -------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("compressor", [TopK(ratio=0.1), ScaledSign()], ids=repr)
def test_skip_drops_one_gradient(compressor: Compressor, backend: str) -> None:
    ours, expected = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": compressor, "backend": backend}
    optimizer, plain = EFSGD(ours, absorb=True, **kwargs), EFSGD(expected, **kwargs)
    for row in record_grads(ours, 3):
        bad = [g.clone() for g in row]
        bad[2][3] = float("nan")
        backward(ours, bad)
        assert all(p.grad is None for p in ours)
        optimizer.step()
        backward(expected, [None if k == 2 else g for k, g in enumerate(row)])
        plain.step()
        plain.zero_grad()
    assert optimizer.skipped_steps() == 3
    assert_same_bits(ours, expected)
    assert not optimizer.residual(ours[2]).any()


@every_backend
def test_raise_comes_out_of_backward(backend: str) -> None:
    named = [("a", torch.nn.Parameter(torch.ones(4))), ("b", torch.nn.Parameter(torch.ones(3)))]
    optimizer = EFSGD(named, 0.1, TopK(k=1), absorb=True, nonfinite="raise", backend=backend)
    b = named[1][1]
    with pytest.raises(pysmooth.NonFiniteGradientError, match="non-finite gradient in 'b'"):
        (b * float("inf")).sum().backward()
    assert b.grad is not None
    assert not any(pending(optimizer))
    assert not optimizer.state
    b.grad = None
    b.sum().backward()
    optimizer.step()
    assert float(optimizer.residual(b).sum()) == pytest.approx(0.2)


# ---- gradients by hand --------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_gradients_by_hand_are_one_step(policy: str, backend: str) -> None:
    """They are looked at together: nothing changes where one is not finite."""
    params = make_params()
    optimizer = EFSGD(params, 0.1, TopK(ratio=0.1), absorb=True, nonfinite=policy, backend=backend)
    row = record_grads(params, 1)[0]
    set_grads(params, row)
    params[4].grad[0] = float("nan")
    before = snapshot(optimizer)
    if policy == "raise":
        with pytest.raises(pysmooth.NonFiniteGradientError, match="group 0, parameter 4"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps() == 1
    assert_same_snapshot(snapshot(optimizer), before)
    params[4].grad[0] = 1.0
    optimizer.step()
    assert all(p.grad is None for p in params)
    assert not any(pending(optimizer))
    assert not torch.equal(params[4], before[0][4])


# ---- copies and checkpoints ---------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
@pytest.mark.parametrize("compressor", [TopK(ratio=0.1), ScaledSign()], ids=repr)
def test_a_copy_between_backward_and_step_is_exact(
    compressor: Compressor, how: str, backend: str
) -> None:
    params = make_params()
    kwargs: dict[str, Any] = {
        "lr": 0.1,
        "compressor": compressor,
        "weight_decay": 0.1,
        "absorb": True,
        "backend": backend,
    }
    optimizer = EFSGD(params, **kwargs)
    rows = record_grads(params, 6)
    backward(params, rows[0])
    optimizer.step()
    backward(params, rows[1])
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = EFSGD([torch.nn.Parameter(p.detach().clone()) for p in params], **kwargs)
        other.load_state_dict(torch.load(file, weights_only=True))
    copies = all_params(other)
    assert pending(other) == pending(optimizer)
    for some, o in ((params, optimizer), (copies, other)):
        backward(some, rows[2])  # no second decay
        o.step()
        for row in rows[3:]:
            backward(some, row)
            assert all(p.grad is None for p in some)
            o.step()
    assert_same_snapshot(snapshot(optimizer), snapshot(other))


def test_a_wrong_count_is_refused() -> None:
    (p,) = make_params([(4,)])
    optimizer = EFSGD([p], 0.1, TopK(k=1), absorb=True)
    p.sum().backward()
    saved = optimizer.state_dict()
    saved["state"][0]["absorbed"] = "many"
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="state 'absorbed' of parameter 'group 0, parameter 0'"):
        optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer), before)


def test_hooks_go_with_the_optimizer_and_do_not_hold_it() -> None:
    params = make_params()
    optimizer = EFSGD(params, 0.1, TopK(k=1), absorb=True)
    backward(params, record_grads(params, 1)[0])
    optimizer.step()
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    backward(params, record_grads(params, 1)[0])
    assert all(p.grad is not None for p in params)


@every_backend
def test_groups_with_their_own_lr_and_a_new_group(backend: str) -> None:
    params = make_params([(5,), (6,), (7,)])
    optimizer = EFSGD(
        [{"params": params[:1]}, {"params": params[1:2], "lr": 0.5}],
        1.0,
        Identity(),
        absorb=True,
        backend=backend,
    )
    start = [p.detach().clone() for p in params]
    for p in params[:2]:
        p.sum().backward()
    optimizer.add_param_group({"params": params[2:], "lr": 0.25})
    params[2].sum().backward()
    optimizer.step()
    for p, s, lr in zip(params, start, (1.0, 0.5, 0.25), strict=True):
        torch.testing.assert_close(p.detach(), s - lr)


@every_backend
def test_states_and_parameters_that_move(backend: str) -> None:
    ours, expected = make_params(), make_params()
    kwargs: dict[str, Any] = {"lr": 0.1, "compressor": TopK(ratio=0.1), "backend": backend}
    optimizer, plain = EFSGD(ours, absorb=True, **kwargs), EFSGD(expected, **kwargs)
    for i, row in enumerate(record_grads(ours, 4)):
        backward(ours, row)
        if i == 1:
            for p in ours:
                p.data = p.data.clone()
        if i == 2:
            for p in ours:
                optimizer.state[p]["residual"] = optimizer.state[p]["residual"].clone()
        optimizer.step()
        backward(expected, row)
        plain.step()
        plain.zero_grad()
    assert_same(optimizer, plain)


# ---- what is refused ----------------------------------------------------------------------------


def test_arguments() -> None:
    params = make_params()
    for kwargs, message in (
        ({"momentum": 0.9}, "absorb=True does not go with momentum"),
        ({"max_norm": 1.0}, "absorb=True does not go with a clip"),
        ({"max_norm": 1.0, "clip": "value"}, "absorb=True does not go with a clip"),
        ({"clip": "agc"}, "absorb=True does not go with a clip"),
        ({"norm": "in_backward"}, "absorb=True does not go with norm='in_backward'"),
    ):
        with pytest.raises(ValueError, match=message):
            EFSGD(params, 0.1, TopK(k=1), absorb=True, **kwargs)
    with pytest.raises(TypeError, match="absorb must be True or False"):
        EFSGD(params, 0.1, TopK(k=1), absorb=1)
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_zero_grad_cannot_take_back() -> None:
    (p,) = make_params([(4,)])
    optimizer = EFSGD([p], 0.1, TopK(k=1), absorb=True)
    optimizer.zero_grad()
    p.sum().backward()
    with pytest.raises(RuntimeError, match="zero_grad\\(\\) cannot take back"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


@every_backend
@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler_is_refused(unscale: bool, backend: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = EFSGD([p], 0.1, TopK(k=1), absorb=True, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="absorb=True does not go with GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(p, before)


@every_backend
def test_sparse_gradients_are_refused(backend: str) -> None:
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = EFSGD(table.named_parameters(), 0.1, TopK(k=1), absorb=True, backend=backend)
    with pytest.raises(ValueError, match=r"gradient of parameter 'weight' has layout torch\."):
        table(torch.tensor([1, 2])).sum().backward()
    assert not optimizer.state
    with pytest.raises(ValueError, match=r"gradient of parameter 'weight' has layout torch\."):
        optimizer.step()


def test_parameters_of_ddp_are_refused() -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        late = EFSGD(model.parameters(), 0.1, TopK(k=1), absorb=True)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="absorb=True does not go with DistributedData"):
            EFSGD(wrapped.parameters(), 0.1, TopK(k=1), absorb=True)
        with pytest.raises(ValueError, match="absorb=True does not go with DistributedData"):
            wrapped(torch.ones(1, 3)).sum().backward()
        assert not late.state
    finally:
        torch.distributed.destroy_process_group()
