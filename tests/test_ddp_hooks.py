"""Hooks of DistributedDataParallel on several processes, against workers simulated in one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_worker as worker
import pytest
import torch
import torch.multiprocessing as mp
from simulated_workers import Clipping, Workers, close, same
from torch import Tensor

from pysmooth import compressors
from pysmooth.distributed import DCSGD, EF14, EF21, Clip21SGD2M, CompressedState, Method
from pysmooth.distributed.schemes import index_bytes
from pysmooth.distributed.signs import share_of
from pysmooth.reference.order import flatten, unflatten

Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[3, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What all ranks found, of so many."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker.run, (request.param, port, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def simulated(method: Method, ranks: int) -> list[Tensor]:
    """Parameters after the steps of `worker.methods`."""
    model = worker.make_model()
    params = list(model.parameters())
    like = [flatten(p.detach()) for p in params]
    workers = (Clipping if method.joint else Workers)(method, ranks, like)
    for step in range(worker.STEPS):
        lr = worker.LR if step < 3 else worker.LR / 10
        grads = []
        for rank in range(ranks):
            model.zero_grad()
            worker.loss_of(model, rank, step).backward()
            grads.append([flatten(p.grad) for p in params if p.grad is not None])
        with torch.no_grad():
            for p, g in zip(params, workers.average(grads, lr), strict=True):
                p -= lr * unflatten(p, g)
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", worker.METHODS)
def test_workers_of_the_formula(name: str, found: Found) -> None:
    ours = [rank[name] for rank in found]
    assert all(same(ours[0], other) for other in ours[1:]), "ranks have parted"
    close(ours[0], simulated(worker.METHODS[name], len(found)))


@pytest.mark.parametrize("name", worker.METHODS)
def test_bytes_are_those_of_the_formula(name: str, found: Found) -> None:
    method, ranks = worker.METHODS[name], len(found)
    numels = [p.numel() for p in worker.make_model().parameters()]
    coded = [d for d in numels if d >= 8]
    expected = 4 * (sum(numels) - sum(coded))
    for d in coded:
        if name == "dsign":
            expected += -(-d // 8)
        elif name == "majority":
            expected += (ranks + 1) * (share_of(d, ranks) // 8)
        elif name == "two-way":
            expected += (ranks + 1) * (4 + share_of(d, ranks) // 8)
        elif name.startswith("clip21"):
            expected += 4 * d
        else:
            c: Any = method.compressor  # type: ignore[attr-defined]
            k = getattr(c, "chosen_of", lambda d: 0)(d)
            top = isinstance(c, compressors.TopK)
            expected += 4 * k + index_bytes(d, k) if top else -(-c.bits(d) // 8)
    messages = (found[0][f"{name} sent"] - expected) / (ranks + 1 if method.two_phase else 1) / 5
    assert messages == int(messages), "five bytes for each message: all is finite, and a digest"
    assert 1 <= messages <= len(numels)


def test_saved_and_resumed_is_to_the_bit(found: Found) -> None:
    for rank in found:
        resumed = {key: value for key, value in rank.items() if key.startswith("resumed")}
        assert len(resumed) == 4
        assert all(resumed.values()), resumed


def test_accumulated_gradients_are_sent_once(found: Found) -> None:
    for rank in found:
        close(*rank["accumulated"])


def test_a_nan_stays_out_of_residuals(found: Found) -> None:
    for rank in found:
        assert rank["nan everywhere"]
        after, calm, dropped = rank["after nan"]
        assert same(after, calm)
        assert dropped == 1


def test_a_scaled_loss(found: Found) -> None:
    for rank in found:
        scaled, calm, scale = rank["scaled"]
        assert scale > 256.0
        assert same(scaled, calm)


def test_dense_steps_first(found: Found) -> None:
    for rank in found:
        close(*rank["warm"])
        assert rank["rate 0"]


def test_a_backward_without_a_step_is_void(found: Found) -> None:
    for rank in found:
        with_it, without, dropped = rank["void"]
        assert same(with_it, without)
        assert dropped == 1


def test_other_numbers_of_ranks(found: Found) -> None:
    for rank in found:
        assert rank["regrouped ef14"]
        assert rank["regrouped ef21"]
        for name in ("after ef14 top-k", "after ef21 top-k"):
            assert same(rank[name], found[0][name])
        assert "EF0()" in rank["other method"]


def test_sixteen_bit_gradients(found: Found) -> None:
    assert all(rank["bfloat16"] for rank in found)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("compressor", "disagree: method is .*ratio=0.1.* rank 0 .*ratio=0.2"),
        ("seed", "disagree: method is .*seed=1.* rank 0 .*seed=0"),
        ("method", "disagree: method is EF14.* rank 0 .*EF21"),
        ("dense_below", "disagree: dense_below is 8 on rank 0 .*9"),
        ("warm-up", "disagree: warmup_steps is 1 on rank 0 .*0"),
        ("scaler", "disagree: a scaler is True on rank 0 .*False"),
        ("rate", "'0.weight' in bucket 0.*learning rate 0.05.* rank 0 .*learning rate 0.1"),
        ("rate of 0", "'0.weight' in bucket 0.*learning rate 0.05.* rank 0 .*learning rate 0.0"),
        ("buckets", "bucket 0 is .* on rank 0 and missing on rank"),
        ("last buckets", "bucket [0-9]+ is .* on rank 0 and missing on rank"),
        ("names", "parameter 'a.weight' is .* on rank 0 and missing on rank"),
        ("order", "another order than rank 0"),
        ("dtype", "parameter 'a.weight' is torch.float16.* rank 0 .*torch.bfloat16"),
        ("shape", "parameter 'a.weight' is .*21, 192.* rank 0 and .*20, 192"),
        ("rate, later", "in step 3: learning rates"),
        ("rate of 0, later", "in step 3: learning rates"),
    ],
)
def test_ranks_that_disagree_are_told(case: str, says: str, found: Found) -> None:
    for rank in found:
        assert re.search(says, rank[f"mismatch: {case}"]), rank[f"mismatch: {case}"]


def _state(**kwargs: Any) -> CompressedState:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return CompressedState(model, optimizer, **{"method": EF14(worker.TOP), **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"method": "topk"}, TypeError, "method"),
        ({"dense_below": -1}, ValueError, "dense_below"),
        ({"dense_below": True}, ValueError, "dense_below"),
        ({"warmup_steps": 1.5}, ValueError, "warmup_steps"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        _state(**kwargs)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EF14(worker.TOP, momentum=1.0), "momentum"),
        (lambda: EF21(worker.TOP, eta=0.0), "eta"),
        (lambda: EF21(worker.TOP, momenta=3), "momenta"),
        (lambda: EF21(worker.TOP, init="half"), "init"),  # type: ignore[arg-type]
        (lambda: DCSGD(worker.TOP), "biased"),
        (lambda: Clip21SGD2M(0.0), "tau"),
        (lambda: Clip21SGD2M(1.0, beta=2.0), "beta"),
        (lambda: Clip21SGD2M(1.0, noise_std=-1.0), "noise_std"),
    ],
)
def test_bad_methods(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_example_trains_alike() -> None:
    path = Path(__file__).parent.parent / "examples" / "ddp_sign.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"loss ([\d.]+), (\d+) bytes", done.stdout)
    (dense, all_bytes), (signs, few_bytes) = ((float(a), int(b)) for a, b in found)
    assert abs(signs / dense - 1) < 0.1
    assert few_bytes < all_bytes / 10
