"""norm="in_backward": the sums that hooks take are those of the step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backward import backward, full, held
from battery import (
    assert_same_bits,
    assert_same_snapshot,
    every_unwaiting_entry,
    make_params,
    record_grads,
    snapshot,
)
from registry import REGISTRY, Entry

import pysmooth
from pysmooth import ClipSGD

# ---- the same bits ------------------------------------------------------------------------------


@every_unwaiting_entry
def test_same_bits_as_in_the_step(entry: Entry) -> None:
    ours, plain = make_params(), make_params()
    optimizer = entry.build(ours, "cpu", norm="in_backward")
    reference = entry.build(plain, "cpu")
    for i, row in enumerate(record_grads(ours, 4)):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad(set_to_none=i % 2 == 0)
            backward(params, row)
            o.step()
        assert optimizer.sums_from_backward() == full(ours)
        assert reference.sums_from_backward() == 0
        assert_same_bits([optimizer.last_norm()], [reference.last_norm()])
        assert_same_bits([optimizer.last_clip_coef()], [reference.last_clip_coef()])
    assert_same_snapshot(snapshot(optimizer), snapshot(reference))


def test_every_optimizer_of_the_package_is_in_the_battery() -> None:
    made = {type(entry.build(make_params([(3,)]), "cpu")) for entry in REGISTRY}
    closures = {"AdSGD", "CoordinateDescent", "OrderOracleCD"}  # see test_theory_optim.py
    known = {
        getattr(pysmooth, name)
        for name in {*pysmooth.__all__} - closures
        if isinstance(getattr(pysmooth, name), type)
        and issubclass(getattr(pysmooth, name), torch.optim.Optimizer)
    }
    assert all(any(issubclass(k, m) or issubclass(m, k) for m in made) for k in known)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, float("inf")])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_dtypes_norms_scopes(dtype: torch.dtype, norm_type: float, scope: str) -> None:
    ours, plain = make_params(dtype=dtype), make_params(dtype=dtype)
    kwargs = {"lr": 0.1, "max_norm": 0.5, "scope": scope, "norm_type": norm_type}
    optimizer, reference = ClipSGD(ours, norm="in_backward", **kwargs), ClipSGD(plain, **kwargs)
    for row in record_grads(ours, 3):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad()
            backward(params, row)
            o.step()
        assert optimizer.sums_from_backward() == full(ours)
        assert_same_bits([optimizer.last_norm()], [reference.last_norm()])
    assert_same_bits(ours, plain)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_tensor_that_several_threads_share(threads: int) -> None:
    torch.set_num_threads(threads)
    gradient = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    found = []
    for norm in ("in_backward", "in_step"):
        p = torch.nn.Parameter(torch.zeros_like(gradient))
        optimizer = ClipSGD([p], 0.1, max_norm=1.0, norm=norm)
        (p * gradient).sum().backward()
        optimizer.step()
        assert optimizer.sums_from_backward() == (norm == "in_backward")
        found += [optimizer.last_norm(), p]
    assert_same_bits(found[:2], found[2:])
    exact = torch.linalg.vector_norm(gradient.double())
    assert float(found[0]) == pytest.approx(float(exact), rel=1e-6)


# ---- policies, scaler ---------------------------------------------------------------------------


@every_unwaiting_entry
def test_skip_and_raise_read_nothing_again(entry: Entry) -> None:
    for policy in ("skip", "raise"):
        params = make_params()
        named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
        optimizer = entry.build(named, "cpu", nonfinite=policy, norm="in_backward")
        good, bad = record_grads(params, 2)
        bad[2][3] = float("nan")
        backward(params, good)
        optimizer.step()
        before = snapshot(optimizer)
        optimizer.zero_grad()
        backward(params, bad)
        if policy == "skip":
            optimizer.step()
            assert optimizer.skipped_steps() == 1
        else:
            with pytest.raises(pysmooth.NonFiniteGradientError, match=r"in 'layer2.weight'$"):
                optimizer.step()
        assert_same_snapshot(snapshot(optimizer), before)
        assert optimizer.sums_from_backward() == full(params)


@pytest.mark.parametrize("how", ["fused", "unscale", "unscale, then no scaler"])
@pytest.mark.parametrize("make", [
    lambda p, **k: ClipSGD(p, 0.1, max_norm=0.5, **k),
    lambda p, **k: pysmooth.AdagradNorm(p, 0.1, b_init=0.5, max_norm=0.5, **k),
    lambda p, **k: pysmooth.EF21(p, 0.1, pysmooth.TopK(ratio=0.2), init="full", **k),
])  # fmt: skip
def test_grad_scaler(make: Any, how: str) -> None:
    """torch counts no version where GradScaler.unscale_ writes."""
    ours, plain = make_params(), make_params()
    optimizer, reference = make(ours, norm="in_backward"), make(plain)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1000.0) for _ in range(2)]
    for row in record_grads(ours, 3):
        for params, o, scaler in zip((ours, plain), (optimizer, reference), scalers, strict=True):
            o.zero_grad()
            scale = float(scaler.scale(torch.ones(())))
            backward(params, [scale * g for g in row])
            if how != "fused":
                scaler.unscale_(o)
            if how == "unscale, then no scaler":
                o.step()
            else:
                scaler.step(o)
            scaler.update()
        assert optimizer.sums_from_backward() == (full(ours) if how == "fused" else 0)
        assert_same_bits([optimizer.last_norm()], [reference.last_norm()])
    assert_same_snapshot(snapshot(optimizer), snapshot(reference))


# ---- what the hook cannot read, and what is refused ---------------------------------------------


def test_sparse_gradients_are_refused_by_the_step() -> None:
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = ClipSGD(
        table.named_parameters(), 0.1, max_norm=1.0, norm="in_backward", backend="cpu"
    )
    table(torch.tensor([1, 2])).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter .weight. has layout torch\.sparse"):
        optimizer.step()
    assert_same_snapshot(snapshot(optimizer), before)


def test_strided_and_expanded_gradients() -> None:
    """sum() makes an expanded gradient; a channels_last convolution one of its own strides."""
    ours, plain = make_params([(6, 5), (4, 3, 3, 3)]), make_params([(6, 5), (4, 3, 3, 3)])
    kwargs = {"lr": 0.1, "max_norm": 0.5}
    optimizer, reference = ClipSGD(ours, norm="in_backward", **kwargs), ClipSGD(plain, **kwargs)
    for _ in range(2):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad()
            x = torch.ones(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
            loss = params[0].sum() + torch.nn.functional.conv2d(x, params[1]).square().sum()
            loss.backward()
            params[0].grad = torch.ones(6, 1).expand(6, 5)
            o.step()
    assert_same_bits(ours, plain)


def test_complex_gradient_with_a_lazy_bit() -> None:
    found = []
    for norm in ("in_backward", "in_step"):
        (p,) = make_params([(9,)], dtype=torch.complex64)
        optimizer = ClipSGD([p], 0.1, max_norm=0.5, norm=norm)
        p.real.sum().backward()
        p.grad = p.grad.conj()
        optimizer.step()
        found.append(p)
    assert_same_bits(found[:1], found[1:])


def test_the_eager_backend_takes_its_norms_in_the_step() -> None:
    ours, plain = make_params(), make_params()
    kwargs = {"lr": 0.1, "max_norm": 0.5, "backend": "eager"}
    optimizer, reference = ClipSGD(ours, norm="in_backward", **kwargs), ClipSGD(plain, **kwargs)
    for row in record_grads(ours, 2):
        for params, o in ((ours, optimizer), (plain, reference)):
            o.zero_grad()
            backward(params, row)
            o.step()
    assert_same_bits(ours, plain)
    assert optimizer.sums_from_backward() == 0
    assert not any(held(p) for p in ours)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="norm must be one of in_step, in_backward; got 'soon'"):
        ClipSGD(make_params(), 0.1, max_norm=1.0, norm="soon")
    params = make_params()
    for make in (
        lambda: ClipSGD(params, 0.1, norm="in_backward"),
        lambda: ClipSGD(params, 0.1, max_norm=1.0, clip="value", norm="in_backward"),
        lambda: pysmooth.EFSGD(
            params, 0.1, pysmooth.TopK(k=1), nonfinite="zero", norm="in_backward"
        ),
    ):
        with pytest.raises(ValueError, match="norm='in_backward' has nothing to do"):
            make()
    with pytest.raises(ValueError, match="norm='in_backward' does not go with clip='agc'"):
        ClipSGD(params, 0.1, clip="agc", norm="in_backward")
    assert not any(held(p) for p in params)
    smooth = ClipSGD.from_smoothness(params, L0=1.0, L1=1.0, norm="in_backward")
    backward(params, record_grads(params, 1)[0])
    smooth.step()
    assert smooth.sums_from_backward() == full(params)
    smooth.param_groups[0].update(smoothness=None, clip="agc", max_norm=None)
    smooth.step()  # sums of whole gradients are of no use
    assert smooth.sums_from_backward() == 0


@pytest.fixture
def process_group() -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_parameters_of_ddp_are_refused() -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ClipSGD(model.parameters(), 0.1, max_norm=1.0, norm="in_backward")
    late = ClipSGD(model.parameters(), 0.1, max_norm=1.0, norm="in_backward")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="does not go with DistributedDataParallel"):
        ClipSGD(wrapped.parameters(), 0.1, max_norm=1.0, norm="in_backward")
    wrapped(torch.ones(1, 3)).sum().backward()
    before = snapshot(late)
    with pytest.raises(ValueError, match="does not go with DistributedDataParallel"):
        late.step()
    assert_same_snapshot(snapshot(late), before)
    ClipSGD(wrapped.parameters(), 0.1, max_norm=1.0).step()  # in the step all is reduced
    ClipSGD(other.parameters(), 0.1, max_norm=1.0, norm="in_backward")


@pytest.mark.filterwarnings("ignore")  # FSDP has remarks about a world of one process
@pytest.mark.usefixtures("process_group")
def test_parameters_of_fsdp_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh))
    with pytest.raises(ValueError, match="does not go with DTensor"):
        ClipSGD([p], 0.1, max_norm=1.0, norm="in_backward", backend="eager")
    sharded = FullyShardedDataParallel(
        torch.nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="does not go with FullyShardedDataParallel"):
        ClipSGD(sharded.parameters(), 0.1, max_norm=1.0, norm="in_backward")


def test_a_compiled_model() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Tanh())
    twin = copy.deepcopy(model)
    optimizer = ClipSGD(model.parameters(), 0.1, max_norm=0.1, norm="in_backward")
    reference = ClipSGD(twin.parameters(), 0.1, max_norm=0.1)
    for m, o in ((torch.compile(model, backend="eager"), optimizer), (twin, reference)):
        for _ in range(2):
            o.zero_grad()
            m(torch.ones(3, 8)).sum().backward()
            o.step()
    assert optimizer.sums_from_backward() == 2
    assert_same_bits(list(model.parameters()), list(twin.parameters()))
