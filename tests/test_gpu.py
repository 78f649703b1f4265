"""On a GPU: the battery's optimizers against float64, and what only a device can show.

`make gpu` runs these; elsewhere they are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    every_entry,
    every_unwaiting_entry,
    every_variant,
    make_params,
    max_ulp,
    oracle,
    record_grads,
    same_bits,
    set_grads,
)
from registry import Entry, Kwargs
from torch import Tensor
from torch.nn import Parameter

import pysmooth
from pysmooth import AdamW, ClipSGD, NonFiniteGradientError
from pysmooth.engine import available_backends

pytestmark = pytest.mark.gpu
on_gpu = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest) -> None:
    given = getattr(request.node, "callspec", None)
    backend = given.params.get("backend", "cuda") if given is not None else "cuda"
    if backend not in available_backends():
        pytest.skip(f"backend {backend!r} is not available")


def moved(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().cuda()) for p in params]


def build(entry: Entry, params: Any, backend: str, **kwargs: Any) -> torch.optim.Optimizer:
    return entry.make(params, backend=backend, **{**entry.main, **kwargs})


# ---- numbers -------------------------------------------------------------------------------------


@on_gpu
@every_variant
def test_agrees_with_float64_reference(entry: Entry, kwargs: Kwargs, backend: str) -> None:
    start = make_params()
    rows = record_grads(start, 20)
    exact = oracle(entry, kwargs, start, rows)
    params = moved(start)
    advance(entry.make(params, backend=backend, **kwargs), params, rows)
    for i, p in enumerate(params):
        error = max_ulp(p.detach().cpu(), exact.params[i], exact.sizes[i])
        assert error <= entry.ulp * len(rows), f"parameter {i}: {error} ULP"


@on_gpu
@every_entry
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_every_dtype(entry: Entry, dtype: torch.dtype, backend: str) -> None:
    if dtype not in entry.dtypes:
        pytest.skip(f"{entry.name} does not take {dtype}")
    start = make_params(dtype=dtype)
    rows = record_grads(start, 10)
    exact = oracle(entry, entry.main, start, rows)
    params = moved(start)
    advance(build(entry, params, backend), params, rows)
    for i, p in enumerate(params):
        error = max_ulp(p.detach().cpu(), exact.params[i], exact.sizes[i])
        assert error <= entry.ulp * len(rows), f"parameter {i}: {error} ULP"


LARGE = ((3_000_001,), (1500, 2000), (64, 3, 7, 7), (1,), (50_000,))


@every_entry
def test_the_cpu_backends_norms_and_values(entry: Entry) -> None:
    """Large enough that many blocks work on a tensor: norms are the CPU's to the bit."""
    results = {}
    for backend in ("cuda", "cpu"):
        start = make_params(LARGE)
        params = moved(start) if backend == "cuda" else start
        optimizer = build(entry, params, backend)
        norms = []
        for row in record_grads(start, 3):
            set_grads(params, row)
            optimizer.step()
            norms.append(optimizer.last_norm())  # type: ignore[attr-defined]
        results[backend] = ([p.detach().cpu() for p in params], norms)
    (ours, a), (theirs, b) = results["cuda"], results["cpu"]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    for p, q in zip(a, b, strict=True):
        assert (p is None) == (q is None)
        if p is not None and q is not None:
            assert torch.equal(p.cpu(), q)


def test_more_elements_than_an_int_can_count() -> None:
    n = 2**31 + 77
    p = Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    places = torch.tensor([0, 2**31 - 1, 2**31, n - 1], device="cuda")
    p.grad[places] = 3.0
    optimizer = ClipSGD([p], lr=1.0, max_norm=1.0, clip_eps=0.0, backend="cuda")
    optimizer.step()
    assert float(optimizer.last_norm()) == 6.0  # type: ignore[arg-type]
    assert torch.equal(p.detach()[places].cpu(), torch.full((4,), -0.5, dtype=torch.bfloat16))
    assert int(p.detach().count_nonzero()) == 4


def test_strided_gradients_and_parameters() -> None:
    results = []
    for place in ("cuda", "cpu"):
        gen = torch.Generator().manual_seed(3)
        params = [
            Parameter(torch.randn(9, 33, 17, generator=gen).to(place).permute(2, 0, 1)),
            Parameter(torch.randn(8, 3, 5, 5, generator=gen).to(place)),
        ]
        optimizer = AdamW(params, 0.1, max_norm=1.0, backend=place)  # type: ignore[arg-type]
        for _ in range(3):
            params[0].grad = torch.randn(17, 9, 33, generator=gen).to(place)
            grad = torch.randn(8, 3, 5, 5, generator=gen).to(place)
            params[1].grad = grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_sync")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), 0.0, 3.0])
def test_clipping_functions(norm_type: float) -> None:
    """The CPU's bits, where nothing but sums in a fixed order is involved; nobody waits."""
    twins = make_params(LARGE)
    params = moved(twins)
    for i, row in enumerate(record_grads(twins, 2)):
        set_grads(params, row)
        set_grads(twins, row)
        held = [p.grad for p in params if p.grad is not None]
        expected = pysmooth.get_total_norm([g.cpu() for g in held], norm_type)
        max_norm = 0.5 * float(expected)
        exact = norm_type != 3.0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if i > 0 else "default")
        norm = pysmooth.get_total_norm(held, norm_type)
        same = pysmooth.clip_grad_norm_(params, max_norm, norm_type)
        torch.cuda.set_sync_debug_mode("default")
        assert norm.is_cuda
        assert torch.equal(norm, same)
        torch.testing.assert_close(norm.cpu(), expected, rtol=0 if exact else 1e-6, atol=0)
        pysmooth.clip_grad_norm_(twins, max_norm, norm_type)
        for p, q in zip(params, twins, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=0 if exact else 1e-6, atol=0)


# ---- determinism, streams ------------------------------------------------------------------------


@every_entry
def test_same_bits_from_run_to_run_and_on_a_side_stream(entry: Entry) -> None:
    def run() -> list[Tensor]:
        params = moved(make_params(LARGE))
        advance(build(entry, params, "cuda"), params, record_grads(make_params(LARGE), 3))
        return [p.detach() for p in params]

    first = run()
    assert_same_bits(first, run())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = run()
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(first, aside)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@on_gpu
@every_unwaiting_entry
def test_a_step_does_not_wait(entry: Entry, backend: str) -> None:
    params = moved(make_params())
    optimizer = build(entry, params, backend)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
    rows = record_grads(make_params(), 4)
    for i, row in enumerate(rows):
        set_grads(params, row)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if i > 0 else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    assert not same_bits(params[0].detach().cpu(), make_params()[0].detach())


# ---- graphs --------------------------------------------------------------------------------------


@on_gpu
@every_unwaiting_entry
def test_replays_of_a_captured_step_and_other_steps(entry: Entry, backend: str) -> None:
    """With a learning rate that changes on the device, against steps without a graph."""
    lr = torch.tensor(0.1, device="cuda")
    params, twins = moved(make_params()), moved(make_params())
    ours = build(entry, params, backend)
    ours.param_groups[0]["lr"] = lr
    theirs = build(entry, twins, backend)
    rows = record_grads(make_params(), 6)
    static = [torch.zeros_like(p) for p in params]

    def feed(row: list[Tensor]) -> None:
        for held, value in zip(static, row, strict=True):
            held.copy_(value)

    def follow(row: list[Tensor]) -> None:
        theirs.param_groups[0]["lr"] = float(lr)
        set_grads(twins, row)
        theirs.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        feed(rows[0])
        for p, g in zip(params, static, strict=True):
            p.grad = g
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    follow(rows[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for i, row in enumerate(rows[1:]):
        lr.fill_(0.1 / (i + 2))
        if i % 2:  # a step beside the graph, with gradients of its own
            set_grads(params, row)
            ours.step()
        else:
            feed(row)
            graph.replay()
        follow(row)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in twins])


@on_gpu
def test_two_graphs_of_one_optimizer_do_not_share_tables(backend: str) -> None:
    p = Parameter(torch.zeros(5, device="cuda"))
    optimizer = ClipSGD([p], 1.0, backend=backend)  # type: ignore[arg-type]
    grads = [torch.full((5,), value, device="cuda") for value in (1.0, 10.0)]
    p.grad = grads[0]
    optimizer.step()
    graphs = []
    for lr, grad in zip((0.5, 2.0), grads, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = grad
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graphs.append(graph)
    for graph in (graphs[1], graphs[0], graphs[0]):
        graph.replay()
    assert torch.equal(p.detach().cpu(), torch.full((5,), -1.0 - 20.0 - 0.5 - 0.5))


# ---- GradScaler, non-finite gradients ------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    layers = (torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    model = torch.nn.Sequential(*layers).cuda()
    twin = copy.deepcopy(model)
    pairs = []
    for net, cls in ((model, AdamW), (twin, torch.optim.AdamW)):
        optimizer = cls(net.parameters(), lr=1e-3)  # type: ignore[operator]
        pairs.append((net, optimizer, torch.amp.GradScaler("cuda", init_scale=2.0**10)))
    for step in range(6):
        x = torch.randn(16, 64, device="cuda") * (1e6 if step == 2 else 1.0)
        for net, optimizer, scaler in pairs:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = net(x).float().square().sum()
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_skipped_and_raised() -> None:
    params = moved(make_params())
    rows = record_grads(make_params(), 3)
    rows[1][4][7] = float("nan")
    optimizer = ClipSGD(params, 0.1, momentum=0.9, nonfinite="skip", backend="cuda")
    advance(optimizer, params, rows)
    assert optimizer.skipped_steps() == 1
    strict = ClipSGD(params, 0.1, nonfinite="raise", backend="cuda")
    before = [p.detach().clone() for p in params]
    advance(strict, params, rows[1:2])
    with pytest.raises(NonFiniteGradientError, match="group 0, parameter 4"):
        strict.last_norm()
    assert_same_bits(before, [p.detach() for p in params])


# ---- choice, devices, saving ---------------------------------------------------------------------


def test_auto_takes_it() -> None:
    assert ClipSGD(moved(make_params()), 0.1).resolved_backend == "cuda"
    block: Any = {"compressor": pysmooth.QSGD(4, scope="block"), "absorb": True}
    assert pysmooth.EFSGD(moved(make_params()), 0.1, **block).resolved_backend == "cuda"


@on_gpu
@pytest.mark.parametrize("compressor", [pysmooth.TopK(ratio=0.01), pysmooth.ScaledSign()], ids=repr)
def test_gradients_absorbed_in_a_captured_step(compressor: Any, backend: str) -> None:
    """Backward and step in one graph, against the same without a graph."""
    x = torch.randn(4, 300, device="cuda")
    weights = [torch.randn(300, 300, device="cuda") / 20 for _ in range(2)]

    def make() -> tuple[Any, Any]:
        params = [Parameter(w.clone()) for w in weights]
        kwargs: Any = {"weight_decay": 0.1, "absorb": True, "backend": backend}
        return params, pysmooth.EFSGD(params, 0.01, compressor, **kwargs)

    def train(params: Any, optimizer: Any) -> None:
        y = torch.tanh(x @ params[0]) @ params[1]
        y.square().mean().backward()
        optimizer.step()

    ours, theirs = make(), make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(*ours)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(*ours)
    assert all(p.grad is None for p in ours[0])
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        train(*theirs)
    assert_same_bits([p.detach() for p in ours[0]], [p.detach() for p in theirs[0]])
    assert ours[1].skipped_steps() == 0


def test_resuming_continues_to_the_bit() -> None:
    params, twins = moved(make_params()), moved(make_params())
    rows = record_grads(make_params(), 6)
    straight = AdamW(params, 0.1, max_norm=1.0, backend="cuda")
    advance(straight, params, rows)
    first = AdamW(twins, 0.1, max_norm=1.0, backend="cuda")
    advance(first, twins, rows[:3])
    second = AdamW(twins, 0.1, max_norm=1.0, backend="cuda")
    second.load_state_dict(first.state_dict())
    advance(second, twins, rows[3:])
    assert_same_bits([p.detach() for p in params], [p.detach() for p in twins])


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")


@two_gpus
def test_another_gpu_than_the_current_one() -> None:
    params = [Parameter(p.detach().to("cuda:1")) for p in make_params()]
    optimizer = ClipSGD(params, 0.1, max_norm=1.0, backend="cuda")
    advance(optimizer, params, record_grads(make_params(), 2))
    assert torch.cuda.current_device() == 0


def over_gpus(params: list[Parameter]) -> list[Parameter]:
    count = torch.cuda.device_count()
    return [Parameter(p.detach().to(f"cuda:{i % count}")) for i, p in enumerate(params)]


@two_gpus
@pytest.mark.usefixtures("no_sync")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@every_unwaiting_entry
def test_parameters_on_several_gpus(entry: Entry) -> None:
    """The bits of one GPU: norms, parameters and states. No host waits."""
    ours, theirs = over_gpus(make_params()), moved(make_params())
    pairs: list[tuple[list[Parameter], Any]]
    pairs = [(ours, build(entry, ours, "cuda")), (theirs, build(entry, theirs, "cuda"))]
    select = pairs[0][1].select_spec()
    if pairs[0][1].absorbs or (select is not None and select[:2] == (1, 1)):
        pytest.skip("absorb=True and TopK(scope='global') are for one GPU")
    for i, row in enumerate(record_grads(make_params(), 4)):
        for params, optimizer in pairs:
            set_grads(params, row)
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode("error" if i > 0 else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    (a, x), (b, y) = pairs
    assert_same_bits([p.detach().cpu() for p in a], [p.detach().cpu() for p in b])
    for p, q in zip(a, b, strict=True):
        for key, value in y.state[q].items():
            assert not isinstance(value, Tensor) or same_bits(x.state[p][key].cpu(), value.cpu())
    assert torch.cuda.current_device() == 0


@two_gpus
def test_clipping_over_several_gpus() -> None:
    ours, theirs = over_gpus(make_params()), moved(make_params())
    row = record_grads(make_params(), 1)[0]
    set_grads(ours, row)
    set_grads(theirs, row)
    norm = pysmooth.clip_grad_norm_(ours, 0.5)
    assert norm.device == ours[0].device
    assert torch.equal(norm, pysmooth.clip_grad_norm_(theirs, 0.5))
    held = [[p.grad.cpu() for p in params if p.grad is not None] for params in (ours, theirs)]
    assert_same_bits(*held)


@two_gpus
def test_a_capture_over_several_gpus_is_refused() -> None:
    params = over_gpus(make_params())
    optimizer = ClipSGD(params, 0.1, max_norm=1.0, backend="cuda")
    advance(optimizer, params, record_grads(make_params(), 1))
    refused = pytest.raises(pysmooth.BackendError, match="cannot capture")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refused:
        optimizer.step()


@two_gpus
def test_grad_scaler_over_several_gpus() -> None:
    """An overflow on one GPU leaves the step out on all."""
    params = over_gpus([Parameter(torch.ones(5)), Parameter(torch.ones(5))])
    optimizer = AdamW(params, 0.1, backend="cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for bad in (False, True):
        scaler.scale(torch.ones((), device="cuda"))  # makes the scale
        for p in params:
            p.grad = torch.full_like(p, 8.0)
        if bad:
            params[1].grad[2] = float("inf")  # type: ignore[index]
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        for p, held in zip(params, before, strict=True):
            assert torch.equal(p.detach(), held) == bad
