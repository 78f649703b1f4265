"""Compressed reductions of FSDP2 on 2 and 4 processes, against DDP's hook and simulated workers."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import fsdp_worker as worker
import pytest
import torch
import torch.multiprocessing as mp
from simulated_workers import Workers, close, same
from torch import Tensor

from pysmooth.distributed import Method

Found = list[dict[str, Any]]


def _found(ranks: int, folder: Path) -> Found:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker.run, (ranks, port, str(folder)), nprocs=ranks)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return _found(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return _found(4, tmp_path_factory.mktemp("four"))


def _cut(x: Tensor, shards: int) -> list[Tensor]:
    """A tensor's shards along its first dimension, flat; the last ones may be empty."""
    each = -(-x.shape[0] // shards)
    return [x[i * each : (i + 1) * each].flatten() for i in range(shards)]


def simulated_hybrid(method: Method, *, both: bool) -> list[Tensor]:
    """The same on 2 x 2 ranks, within groups compressed; between them, too, or means."""
    model = worker.make_model()
    params = list(model.parameters())
    cut = [[s.detach() for s in _cut(p, 2)] for p in params]
    within = [Workers(method, 2, [s for row in cut for s in row]) for _ in range(2)]
    between = [Workers(method, 2, [row[i] for row in cut]) for i in range(2)]
    lr = worker.LR
    for step in range(worker.STEPS):
        lr *= 1.0 if step < 3 else 0.5
        flat = []
        for group in range(2):
            pieces = []
            for rank in (2 * group, 2 * group + 1):
                model.zero_grad()
                worker.loss_of(model, rank, step).backward()
                grads = [p.grad.clone() for p in params if p.grad is not None]
                pieces.append([s for g in grads for s in _cut(g, 2)])
            flat.append(within[group].average(pieces, lr))
        if both:
            by_shard = [between[i].average([row[i::2] for row in flat], lr) for i in range(2)]
            means = [list(shards) for shards in zip(*by_shard, strict=True)]
        else:
            mean = [torch.stack(some).mean(0) for some in zip(*flat, strict=True)]
            means = [mean[2 * i : 2 * i + 2] for i in range(len(params))]
        with torch.no_grad():
            for p, shard_means in zip(params, means, strict=True):
                p -= lr * torch.cat(shard_means).view_as(p)
    return [p.detach() for p in params]


def simulated(method: Method, outer: int, inner: int, *, scatter: bool) -> list[Tensor]:
    """Whole parameters after the steps of `worker.trained`."""
    model = worker.make_model()
    params = list(model.parameters())
    shards = outer * inner if scatter else inner
    cut = [[s.detach() for s in _cut(p, shards)] for p in params]
    if scatter:  # one set of workers for all shards, that has them in order
        everybody = [Workers(method, outer * inner, [s for row in cut for s in row])]
    else:
        everybody = [Workers(method, outer, [row[i] for row in cut]) for i in range(inner)]
    lr = worker.LR
    for step in range(worker.STEPS):
        lr *= 1.0 if step < 3 else 0.5
        grads = []
        for rank in range(outer * inner):
            model.zero_grad()
            worker.loss_of(model, rank, step).backward()
            grads.append([p.grad.clone() for p in params if p.grad is not None])
        if not scatter:
            groups = [grads[o * inner : (o + 1) * inner] for o in range(outer)]
            grads = [[torch.stack(gs).mean(0) for gs in zip(*g, strict=True)] for g in groups]
        pieces = [[_cut(g, shards) for g in own] for own in grads]
        if scatter:
            flat = everybody[0].average([[s for row in own for s in row] for own in pieces], lr)
            means = [flat[i * shards : (i + 1) * shards] for i in range(len(params))]
        else:
            by_shard = [
                workers.average([[row[i] for row in own] for own in pieces], lr)
                for i, workers in enumerate(everybody)
            ]
            means = [[by_shard[i][j] for i in range(inner)] for j in range(len(params))]
        with torch.no_grad():
            for p, shard_means in zip(params, means, strict=True):
                p -= lr * torch.cat(shard_means).view_as(p)
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", worker.UNDER_DDP)
def test_all_reduce_is_the_hook_of_ddp(name: str, two: Found) -> None:
    for rank in two:
        assert same(rank["all-reduce"][name], rank["all-reduce"][f"ddp {name}"])


@pytest.mark.parametrize("name", worker.ALL_REDUCED)
def test_all_reduce_of_shards(name: str, four: Found) -> None:
    ours = [rank["all-reduce"][name] for rank in four]
    assert all(same(ours[0], other) for other in ours[1:]), "ranks have parted"
    close(ours[0], simulated(worker.METHODS[name], 2, 2, scatter=False))


@pytest.mark.parametrize("name", worker.SCATTERED)
def test_reduce_scatter(name: str, two: Found) -> None:
    close(two[0]["reduce-scatter"][name], simulated(worker.METHODS[name], 2, 1, scatter=True))


@pytest.mark.parametrize("name", ["ef14 top-k", "ef21 full"])
def test_reduce_scatter_with_empty_shards(name: str, four: Found) -> None:
    close(four[0]["reduce-scatter"][name], simulated(worker.METHODS[name], 4, 1, scatter=True))


@pytest.mark.parametrize("name", ["ef14 top-k", "ef21 full"])
def test_hybrid_sharding(name: str, four: Found) -> None:
    """One mesh of two dimensions: which of its reductions is compressed is a choice."""
    method = worker.METHODS[name]
    for rank in four:
        assert same(rank["hybrid all-reduce"][name], rank["all-reduce"][name])
    close(four[0]["hybrid reduce-scatter"][name], simulated_hybrid(method, both=False))
    close(four[0]["hybrid both"][name], simulated_hybrid(method, both=True))


@pytest.mark.parametrize("kind", ["all-reduce", "reduce-scatter"])
def test_what_is_kept(kind: str, four: Found) -> None:
    for rank in four:
        found = rank[kind]
        assert found["resumed ef14 sign, momentum"]
        assert found["resumed ef21 full"]
        close(*found["accumulated"])


@pytest.mark.parametrize("name", ["ef14 sign, momentum", "ef21 full"])
def test_another_number_of_ranks_begins_anew(name: str, four: Found) -> None:
    assert all(rank["reduce-scatter"][f"moved {name}"] for rank in four)


@pytest.mark.parametrize(
    "kind",
    [
        *("all-reduce", "reduce-scatter"),
        *("hybrid all-reduce", "hybrid reduce-scatter", "hybrid both"),
    ],
)
def test_void_steps(kind: str, four: Found) -> None:
    """A NaN that one rank brings is dropped by all, also by those that got no message of it."""
    for rank in four:
        after, calm, dropped, nan = rank[kind]["void"]
        assert nan
        assert dropped == 2
        assert same(after, calm)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("plain model", "TypeError: no module of the model is fully_shard's"),
        ("joint", "ValueError: Clip21SGD2M clips by the norm of all gradients"),
        ("two phases", "ValueError: TwoWaySign sends back"),
        ("float16", "TypeError: FSDP module .* reduces in float16"),
        ("hybrid", r"ValueError: process_group has ranks .* replicas on \["),
        ("accumulated over replicas", r"ValueError: FSDP module .* set_requires_all_reduce\(False"),
        ("both", "ValueError: compress_all_reduce behind compress_reduce_scatter needs"),
        ("both, the wrong way round", "ValueError: call compress_reduce_scatter before"),
        ("overlap", r"ValueError: process_group has ranks \[0, 1, 2, 3\] in common"),
        ("unused", "RuntimeError: FSDP module '' reduces 56 numbers.* some got no gradient"),
        ("twice", "RuntimeError: FSDP module 'inner' reduces its gradients twice in one backward"),
        ("replaced", "ValueError: a parameter of FSDP module '' was replaced, or began to require"),
        ("divided", "ValueError: FSDP module .* has a gradient divide factor"),
        ("sums", "ValueError: FSDP module .* was told to reduce by sums alone"),
        ("other ranks", "ValueError: modules are sharded over different process groups"),
        ("mismatch", "MismatchError: ranks disagree: method is .*0.1.* rank 0 .*0.2"),
    ],
)
def test_refusals(case: str, says: str, four: Found) -> None:
    for rank in four:
        assert re.search(says, rank[f"refused: {case}"]), rank[f"refused: {case}"]
