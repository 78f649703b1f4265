"""What tests of sharded parameters run in every one of a few local processes."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreter
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from battery import DEVICE_BACKENDS
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pysmooth.engine import backends

# What takes the steps: under PYSMOOTH_EMULATED=1 the CUDA backend, on the host (tests/simt), under
# TRITON_INTERPRET=1 Triton's.
BACKEND = (*DEVICE_BACKENDS, "cpu")[0]
# Uneven on 2 and 4 processes, one with fewer rows than processes (empty shards), one scalar-like.
SHAPES = ((37, 5), (3, 7), (130,), (1,), (8, 6), (64, 40))


def worker(
    rank: int, world: int, path: str, cases: tuple[Callable[..., None], ...], args: Any
) -> None:
    """Runs the cases in one process, one after the other."""
    torch.set_num_threads(1)
    if BACKEND == "cuda":
        from simt import emulated

        sys.modules["pysmooth._cuda"] = emulated.module()
    if BACKEND == "triton":
        interpreter.tame()
    if BACKEND != "cpu":  # "auto" finds it, as on a GPU
        infos = {info.name: info for info in backends.REGISTERED}
        device = replace(infos[BACKEND], devices=lambda: ("cpu",), auto=("cpu",))
        backends.REGISTERED = (device, infos["eager"])
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        for case in cases:
            case(*args)
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others get gloo's error, not a wait for this one
    gc.collect()  # shards, before their process group
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo do not always outlive the interpreter's end in peace


def run(world: int, path: str, *cases: Callable[..., None], args: Any = ()) -> None:
    """Runs the cases in that many processes."""
    mp.spawn(worker, (world, path, cases, args), nprocs=world)


def meshes() -> dict[str, tuple[DeviceMesh, Any]]:
    """Meshes of 4 processes, with how tensors lie on them."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return {
        "fsdp": (line, lambda shape: [Shard(0)]),
        "hsdp": (square, lambda shape: [Replicate(), Shard(0)]),
        "2d": (square, lambda shape: [Shard(0), Shard(len(shape) - 1)]),
        "tp": (square["inner"], lambda shape: [Shard(len(shape) - 1)]),
    }


def values(seed: int, scale: float = 1.0) -> list[Tensor]:
    """Tensors of all shapes, the same in every process."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) * scale for shape in SHAPES]


def cut(tensors: list[Tensor], mesh: DeviceMesh, placed: Any, every: int = 5) -> list[Tensor]:
    """Shards of the tensors; each fifth stays a plain one."""
    return [
        t.clone() if i % every == every - 1 else distribute_tensor(t.clone(), mesh, placed(t.shape))
        for i, t in enumerate(tensors)
    ]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agreed(value: Tensor) -> bool:
    """Whether all processes have the same bits."""
    every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value)
    return all(torch.equal(every[0], other) for other in every)
