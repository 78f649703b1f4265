"""EFSGD(absorb=True): gradients go into the residual in backward, and are freed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from absorbing import compare, every_compressor
from battery import assert_same_bits, every_backend, make_params
from torch import Tensor

from pysmooth import EFSGD
from pysmooth.compressors import Compressor, Identity, ScaledSign, TopK

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


def test_one_plan_takes_in_all_gradients() -> None:
    """Made anew for each, it would give the same numbers, slowly."""
    params = make_params([(3,), (5, 2)])
    optimizer = EFSGD(params, 0.1, ScaledSign(), absorb=True, backend="cpu")
    plans = set()
    for _ in range(3):
        for p in params:
            p.square().sum().backward()  # type: ignore[no-untyped-call]
            plans.add(optimizer._ready_engine()._plan)  # type: ignore[attr-defined]
        optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert len(plans) <= 2  # one that allocates states, and one that finds them


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
