"""Sharded steps at sizes that models have: several chunks, hundreds of tensors, threads.

Three processes, so that nothing is cut evenly; one tensor is all on the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import BACKEND, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import pysmooth
from pysmooth.compressors import ScaledSign, TopK
from pysmooth.distributed import set_sharding
from pysmooth.optim._base import FusedOptimizer

Make = Callable[[list[Tensor]], FusedOptimizer]
LARGE = [(400, 330), (40_001,), (1,), (4097,), (2, 33_000), (1, 70_000)]
# Gradients are asked for by all threads from 512 on.
MANY = [((5, 3), (7,), (1,), (2, 2), (33,))[i % 5] for i in range(520)]


def _part(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    parts, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    local = parts[rank].clone() if rank < len(parts) else whole[:0]
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _here(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    return _part(whole, mesh).to_local()


def _steps(
    make: Make, shapes: list[Any], bound: float, *, spoiled: bool = False, rounded: bool = False
) -> None:
    """Parts end where the parts of whole tensors do, some of which sit steps out."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gen = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=gen) for shape in shapes]
    ours = [_part(x, mesh).requires_grad_() for x in start]
    alone = [x.clone().requires_grad_() for x in start]
    optimizer, reference = make(ours), make(alone)
    compressor = getattr(optimizer, "compressor", None)
    if compressor is not None and compressor.select is not None:
        set_sharding(optimizer, compress="global")
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, alone, strict=True)):
            g = torch.randn(q.shape, generator=gen)
            g = g.round() if rounded else g
            if spoiled and step == 1 and i == 0:
                g.view(-1)[-1] = math.nan  # in the last process's last element
            live = (i + step) % 4 != 3
            p.grad, q.grad = (_part(g, mesh), g) if live else (None, None)
        optimizer.step()
        reference.step()
    assert optimizer.skipped_steps() == reference.skipped_steps() == int(spoiled)
    for p, q in zip(ours, alone, strict=True):
        error = (p.detach().to_local() - _here(q.detach(), mesh)).abs().sum()
        assert float(error) <= bound * float(q.detach().abs().sum())
    norm, expected = optimizer.last_norm(), reference.last_norm()
    if norm is not None and expected is not None:
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


def _sizes() -> None:
    torch.set_num_threads(2)
    for shapes in (LARGE, MANY):
        _steps(
            lambda p: pysmooth.AdamW(p, 1e-2, max_norm=1.0, nonfinite="skip"),
            shapes,
            2e-6,
            spoiled=True,
        )
    _steps(lambda p: pysmooth.NormEF21SGDM(p, 0.1, ScaledSign()), LARGE, 2e-6)
    for compressor, rounded in ((TopK(ratio=0.01), True), (TopK(k=30_000), False)):
        _steps(lambda p, c=compressor: pysmooth.EFSGD(p, 0.1, c), LARGE, 0, rounded=rounded)


def _selections_of_many_are_packed() -> None:
    """Among all shards: as many collectives for 60 tensors as for one."""
    calls, ask = 0, dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return ask(*args, **kwargs)

    found = []
    for shapes in (MANY[:1], MANY[:60]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted)
            calls = 0
            _steps(lambda p: pysmooth.EFSGD(p, 0.1, TopK(k=2)), shapes, 0)
        found.append(calls)
    assert found[0] == found[1] > 0


def _a_stage_without_gradients() -> None:
    """A process of whose tensors none takes part answers the others' questions all the same."""
    for make in (
        lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.5),
        lambda p: pysmooth.AdagradNorm(p, 0.5, b_init=0.1),
        lambda p: pysmooth.NormalizedSGD(p, 0.1),
        lambda p: pysmooth.NormEF21SGDM(p, 0.1, ScaledSign()),
        lambda p: pysmooth.EFSGD(p, 0.1, ScaledSign(scope="global")),
    ):
        p, q = (torch.ones(50, 3, requires_grad=True) for _ in range(2))
        optimizer, reference = make([p]), make([q])
        set_sharding(optimizer, process_group=dist.group.WORLD)
        for _ in range(2):
            q.grad = torch.full((50, 3), 0.5)
            p.grad = q.grad.clone() if dist.get_rank() == 0 else None
            optimizer.step()
            reference.step()
        expected = q.detach() if dist.get_rank() == 0 else torch.ones(50, 3)
        assert torch.equal(p.detach(), expected)


def _a_gradient_that_most_lack() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = _part(torch.ones(8, 3), mesh).requires_grad_()
    if dist.get_rank() == 1:
        p.grad = _part(torch.ones(8, 3), mesh)
    with pytest.raises(RuntimeError, match="'weight' has a gradient in some processes"):
        pysmooth.NormalizedSGD([("weight", p)], 0.1).step()
    assert torch.equal(p.to_local(), _here(torch.ones(8, 3), mesh))


def _selected_beside_replicas() -> None:
    """Each process would choose other coordinates of the tensor that all of them hold."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gen = torch.Generator().manual_seed(2)
    grads = [torch.randn(40, 30, generator=gen), torch.randn(30, generator=gen)]
    for other in ([], [Replicate()]):
        p = _part(torch.zeros(40, 30), mesh).requires_grad_()
        q = torch.zeros(30)
        q = (DTensor.from_local(q, mesh, other, run_check=False) if other else q).requires_grad_()
        p.grad = _part(grads[0], mesh)
        q.grad = DTensor.from_local(grads[1], mesh, other, run_check=False) if other else grads[1]
        named = [("weight", p), ("bias", q)]
        optimizer = pysmooth.EFSGD(named, 0.1, TopK(ratio=0.1, scope="global"))
        set_sharding(optimizer, compress="per_shard")
        with pytest.raises(ValueError, match="sharded alike; 'bias' is not as 'weight'"):
            optimizer.step()
        assert not optimizer.state
    optimizer = pysmooth.EFSGD([p], 1.0, TopK(k=5, scope="global"))
    set_sharding(optimizer, compress="per_shard")
    optimizer.step()
    assert int((p.to_local() != 0).sum()) == 5


@pytest.mark.interpreted
@pytest.mark.emulated
def test_three_processes(tmp_path: Path) -> None:
    cases = [_a_gradient_that_most_lack]
    if BACKEND != "triton":  # which takes no stages, and is slow here
        cases += [_sizes, _a_stage_without_gradients, _selected_beside_replicas]
    if BACKEND == "cpu":
        cases += [_selections_of_many_are_packed]
    run(3, str(tmp_path / "store"), *cases)
