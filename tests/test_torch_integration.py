"""ClipSGD inside the rest of torch: modules, DDP, parametrisations, threads, forks."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    assert_unchanged,
    every_backend,
    make_params,
    record_grads,
    same_bits,
    set_grads,
    snapshot,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pysmooth import ClipSGD


def model() -> nn.Sequential:
    torch.set_num_threads(1)  # on busy machines, threads that wait for each other take seconds
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(4)
    return [
        (torch.randn(8, 20, generator=gen), torch.randint(0, 5, (8,), generator=gen))
        for _ in range(n)
    ]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list, *, clip: float = 0) -> list:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@every_backend
def test_training_follows_torch_sgd_with_clip_grad_norm(backend: str) -> None:
    """The same loss curve from one changed line, and it goes down."""
    data = batches(4) * 8
    theirs, mine = model(), model()
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer = ClipSGD(
        mine.parameters(), 0.1, max_norm=0.5, momentum=0.9, weight_decay=1e-3, backend=backend
    )
    want = train(theirs, reference, data, clip=0.5)
    got = train(mine, optimizer, data)
    assert got == pytest.approx(want, rel=1e-3)
    assert got[-1] < 0.5 * got[0]


@every_backend
def test_distributed_data_parallel(tmp_path: Path, backend: str) -> None:
    """One process is enough: DDP's gradients are views into its buckets."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    data = batches(4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, inner = model(), model()
        wrapped = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=True)
        for net in (plain, wrapped):
            kwargs = {"lr": 0.1, "momentum": 0.9, "max_norm": 0.5, "backend": backend}
            train(net, ClipSGD(net.parameters(), **kwargs), data)
    finally:
        dist.destroy_process_group()
    for p, q in zip(plain.parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@every_backend
def test_parametrized_module(backend: str) -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).T

    torch.manual_seed(0)
    net = nn.Linear(4, 4, bias=False)
    nn.utils.parametrize.register_parametrization(net, "weight", Symmetric())
    optimizer = ClipSGD(net.named_parameters(), 0.1, max_norm=1.0, momentum=0.9, backend=backend)
    assert optimizer.param_labels() == ["parametrizations.weight.original"]
    x, before = torch.randn(3, 4), net.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        optimizer.step()
    assert not same_bits(net.weight, before)
    assert torch.equal(net.weight, net.weight.T)
    assert net(x).square().sum() < loss


@every_backend
@pytest.mark.parametrize("swap", [True, False])
def test_module_converted_in_mid_training(backend: str, swap: bool) -> None:
    """Module.to(dtype) exchanges the parameters' insides; the float32 momentum goes on as it is."""
    params = make_params([(6, 5), (6,)])
    net = nn.Linear(5, 6)
    net.weight, net.bias = params
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, max_norm=1.0, backend=backend)
    advance(optimizer, params, record_grads(params, 2))
    momentum = optimizer.state[net.weight]["momentum_buffer"].clone()
    optimizer.zero_grad()
    was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        net.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(was)
    assert net.weight is params[0]
    assert same_bits(optimizer.state[net.weight]["momentum_buffer"], momentum)
    start = net.weight.detach().clone()
    set_grads(params, [torch.zeros(6, 5), torch.zeros(6)])
    optimizer.step()
    momentum *= 0.9
    assert same_bits(optimizer.state[net.weight]["momentum_buffer"], momentum)
    assert net.weight.dtype == torch.bfloat16
    assert same_bits(net.weight, (start.float() - momentum * 0.1).bfloat16())


@every_backend
def test_swap_tensors(backend: str) -> None:
    params, expected = make_params([(4,), (3,)]), make_params([(4,), (3,)])
    rows = record_grads(params, 4)
    kwargs = {"lr": 0.1, "momentum": 0.9, "max_norm": 1.0, "backend": backend}
    optimizer, plain = ClipSGD(params, **kwargs), ClipSGD(expected, **kwargs)
    advance(optimizer, params, rows[:2])
    advance(plain, expected, rows[:2])
    other = nn.Parameter(torch.full((4,), 2.0))
    optimizer.zero_grad()
    torch.utils.swap_tensors(params[0], other)
    with torch.no_grad():
        expected[0].fill_(2.0)
    kept = other.detach().clone()  # the old values, now in the other tensor
    advance(optimizer, params, rows[2:])
    advance(plain, expected, rows[2:])
    assert_same_bits(params, expected)
    assert same_bits(other, kept)


@every_backend
def test_swapping_tensors_there_and_back_leaves_training_alone(backend: str) -> None:
    param, other = make_params([(4,), (4,)])
    optimizer = ClipSGD([param], lr=0.1, momentum=0.9, max_norm=1.0, backend=backend)

    def step() -> None:
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()

    step()
    torch.utils.swap_tensors(param, other)  # an average of weights, say, to be evaluated
    torch.utils.swap_tensors(param, other)
    before = param.detach().clone()
    step()
    assert not torch.equal(param, before)


@every_backend
def test_module_moved_to_float64_is_refused_until_its_states_are(backend: str) -> None:
    params = make_params([(4,)])
    optimizer = ClipSGD([("weight", params[0])], lr=0.1, momentum=0.9, backend=backend)
    advance(optimizer, params, record_grads(params, 1))
    optimizer.zero_grad()
    params[0].data = params[0].data.double()
    params[0].grad = torch.ones(4, dtype=torch.float64)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"momentum_buffer.*weight.*float64"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.load_state_dict(optimizer.state_dict())  # casts the states to what is needed
    optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.float64


@every_backend
@pytest.mark.parametrize(
    "value",
    [torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16), torch.ones(2, 3)],
    ids=["float64", "bfloat16", "shape"],
)
@pytest.mark.parametrize("max_norm", [None, 100.0])
def test_parameter_given_data_of_another_kind(
    value: Tensor, max_norm: float | None, backend: str
) -> None:
    """No state stands in the way: the step has to see the new parameter before it judges grads."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = ClipSGD([p], lr=0.5, max_norm=max_norm, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    p.data = value.clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert same_bits(p, value - 0.5)


@every_backend
@pytest.mark.parametrize("named", [True, False])
def test_schedulers_compose(backend: str, named: bool) -> None:
    net = model()
    source = net.named_parameters() if named else net.parameters()
    optimizer = ClipSGD(source, 0.4, max_norm=1.0, backend=backend)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        ],
        milestones=[2],
    )
    seen = []
    for x, y in batches(6):
        seen.append(optimizer.param_groups[0]["lr"])
        train(net, optimizer, [(x, y)])
        schedule.step()
    assert seen == pytest.approx([0.1, 0.25, 0.4, 0.3414214, 0.2, 0.0585786])


@every_backend
def test_averaged_model_and_frozen_parameters(backend: str) -> None:
    net = model()
    net[0].requires_grad_(False)
    frozen = net[0].weight.detach().clone()
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = ClipSGD(net.parameters(), 0.1, max_norm=1.0, momentum=0.9, backend=backend)
    train(net, optimizer, batches(2))
    average.update_parameters(net)
    assert same_bits(net[0].weight, frozen)
    assert net[0].weight not in optimizer.state
    assert same_bits(average.module[4].weight, net[4].weight)


# ---- processes and threads ----------------------------------------------------------------------


def some_steps(backend: str, seed: int = 1) -> list[nn.Parameter]:
    params = make_params([(300, 400), (77,), (5003,)], seed=seed)
    optimizer = ClipSGD(params, lr=0.1, momentum=0.9, max_norm=1.0, backend=backend)
    advance(optimizer, params, record_grads(params, 4, seed=seed))
    return params


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thread_count_does_not_change_a_bit(threads: int) -> None:
    torch.set_num_threads(1)
    want = some_steps("cpu")
    torch.set_num_threads(threads)
    assert_same_bits(some_steps("cpu"), want)
    assert torch.get_num_threads() == threads  # and is left as the user set it


@pytest.mark.many_steps  # and the interpreter is not made for threads
@every_backend
def test_two_python_threads(backend: str) -> None:
    want = [some_steps(backend, seed) for seed in (1, 2)]
    got: dict[int, list[list[nn.Parameter]]] = {1: [], 2: []}

    def work(seed: int) -> None:
        for _ in range(5):
            got[seed].append(some_steps(backend, seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in got]
    for w in workers:
        w.start()
    for w in workers:
        w.join(timeout=60)
    for seed, expected in zip(got, want, strict=True):
        assert len(got[seed]) == 5
        for params in got[seed]:
            assert_same_bits(params, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_steps() -> None:
    """OpenMP hangs in a forked child: the step has to notice, and go on serially.

    The parameters lie in shared memory, so that the parent sees what the child did to them.
    """
    shapes = [(300, 400), (77,)]
    params, expected = make_params(shapes), make_params(shapes)
    for p in params:
        p.data.share_memory_()
    rows = record_grads(params, 3)
    kwargs = {"lr": 0.1, "momentum": 0.9, "max_norm": 1.0, "backend": "cpu"}
    optimizer, plain = ClipSGD(params, **kwargs), ClipSGD(expected, **kwargs)
    advance(optimizer, params, rows[:1])  # the parent's thread pool is up
    advance(plain, expected, rows[:1])
    set_grads(params, rows[1])
    pid = os.fork()
    if pid == 0:  # only the step: torch's own kernels would hang here as well
        code = 1
        try:
            optimizer.step()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert done, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 0
    advance(plain, expected, rows[1:2])
    assert_same_bits(params, expected)
    advance(plain, expected, rows[2:])  # the parent's own threads still work


# ---- hooks and the profiler ----------------------------------------------------------------------


def one_step_optimizer(cls: type[ClipSGD] = ClipSGD) -> ClipSGD:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return cls([p], 0.1)


class Subclass(ClipSGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("cls", [ClipSGD, Subclass])
def test_hooks_run_once_with_torchs_arguments(cls: type[ClipSGD]) -> None:
    optimizer = one_step_optimizer(cls)
    calls: list[Any] = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append((o, a, k))),
        optimizer.register_step_post_hook(lambda o, a, k: calls.append((o, a, k))),
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append((o, a, k))),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append((o, a, k))),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == [(optimizer, (optimizer,), {})] * 4


def test_the_profiler_sees_steps() -> None:
    optimizer = one_step_optimizer()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#ClipSGD.step") == 1
