"""Sharded steps on GPUs: parameters end where the same processes on CPUs bring them.

With two GPUs over NCCL, without a look at a device; on one of them two processes share it, over
gloo. The CPU's side of these runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import pysmooth
from pysmooth.compressors import ScaledSign, TopK
from pysmooth.distributed import set_sharding
from pysmooth.optim._base import FusedOptimizer

WORLD, STEPS = 2, 4
SHAPES = ((37, 5), (1, 7), (130,), (64, 40), (8193, 3))
METHODS: dict[str, Callable[[list[Tensor]], FusedOptimizer]] = {
    "clip": lambda p: pysmooth.ClipSGD(p, 0.1, momentum=0.9, max_norm=0.5),
    "tensors": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.3, scope="tensor"),
    "largest": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.5, norm_type=float("inf")),
    "adamw": lambda p: pysmooth.AdamW(p, 1e-2, max_norm=1.0, nonfinite="skip"),
    "adagrad_norm": lambda p: pysmooth.AdagradNorm(p, 0.5, b_init=0.1),
    "signs": lambda p: pysmooth.EFSGD(p, 0.1, ScaledSign(scope="global")),
    "top_k": lambda p: pysmooth.EFSGD(p, 0.1, TopK(ratio=0.05)),
}


def _values(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in SHAPES]


def _steps(rank: int, folder: str, device: str, backend: str, alone: bool) -> None:
    nccl = device == "cuda" and not alone
    if device == "cuda":
        torch.cuda.set_device(0 if alone else rank)
    store = dist.FileStore(f"{folder}/{backend}", WORLD)
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh(device, (WORLD,))
    ends = {}
    for name, make in METHODS.items():
        if name == "top_k" and backend == "triton":
            continue  # which refuses it

        def part(whole: Tensor) -> Tensor:
            pieces = whole.chunk(WORLD)
            local = pieces[rank] if rank < len(pieces) else whole[:0]
            shape, stride = whole.shape, whole.stride()
            return DTensor.from_local(
                local.to(device), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
            )

        params = [part(x).requires_grad_() for x in _values(1)]
        optimizer = make(params)
        optimizer.use_backend(backend)
        if name == "top_k":
            set_sharding(optimizer, compress="global")
        for step in range(STEPS):
            for p, g in zip(params, _values(10 + step), strict=True):
                p.grad = part(g)
            if nccl:  # the first step makes the plan
                torch.cuda.set_sync_debug_mode("error" if step == STEPS - 1 else "default")
            optimizer.step()
        if nccl:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.resolved_backend == backend
        ends[name] = [p.to_local().detach().cpu() for p in params]  # type: ignore[attr-defined]
    torch.save(ends, f"{folder}/{backend}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _ends(folder: Path, backend: str, alone: bool = False) -> list[dict[str, list[Tensor]]]:
    device = "cpu" if backend == "cpu" else "cuda"
    mp.spawn(_steps, (str(folder), device, backend, alone), nprocs=WORLD)
    return [torch.load(folder / f"{backend}-{rank}.pt") for rank in range(WORLD)]


def test_parts_on_cpus(tmp_path: Path) -> None:
    """Parameters move; methods differ."""
    ends = _ends(tmp_path, "cpu")
    start = _values(1)
    for name in METHODS:
        moved = [torch.cat([end[name][i] for end in ends]) for i in range(len(SHAPES))]
        assert all(not torch.equal(p, q) for p, q in zip(moved, start, strict=True)), name
    assert not torch.equal(ends[0]["clip"][0], ends[0]["tensors"][0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_parts_on_gpus_do_the_same(tmp_path: Path, backend: str) -> None:
    alone = torch.cuda.device_count() < WORLD
    for here, there in zip(_ends(tmp_path, "cpu"), _ends(tmp_path, backend, alone), strict=True):
        for name, moved in there.items():
            for p, q in zip(here[name], moved, strict=True):
                torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=name)
