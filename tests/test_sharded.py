"""DTensor parameters: every method steps as on the whole tensors, in a few local processes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import BACKEND, agreed, cut, meshes, run, values, whole
from sharded_swap import there_and_back
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import pysmooth
from pysmooth.compressors import QSGD, RandK, ScaledSign, TopK
from pysmooth.distributed import set_sharding
from pysmooth.optim._base import FusedOptimizer

Make = Callable[[list[Tensor]], FusedOptimizer]

METHODS: dict[str, Make] = {
    "clip_global": lambda p: pysmooth.ClipSGD(p, 0.1, momentum=0.9, max_norm=0.5),
    "clip_tensor": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.3, scope="tensor"),
    "clip_group": lambda p: pysmooth.ClipSGD(
        [{"params": p[:3]}, {"params": p[3:], "max_norm": 0.2}], 0.1, max_norm=0.5, scope="group"
    ),
    "clip_inf": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.5, norm_type=math.inf),
    "clip_1": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.5, norm_type=1.0, clip="smooth"),
    "clip_3": lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=0.5, norm_type=3.0),
    "normalize": lambda p: pysmooth.ClipSGD(p, 0.1, clip="normalize"),
    "skip": lambda p: pysmooth.AdamW(p, 1e-2, max_norm=1.0, nonfinite="skip"),
    "adagrad": lambda p: pysmooth.Adagrad(p, 0.1, max_norm=1.0),
    "adagrad_norm": lambda p: pysmooth.AdagradNorm(p, 0.5, b_init=0.1),
    "adagrad_norm_tensor": lambda p: pysmooth.AdagradNorm(p, 0.5, b_init=0.1, scope="tensor"),
    "clipradagradd": lambda p: pysmooth.ClipRAdaGradD(p, 0.5, b_init=0.1, max_norm=1.0),
    "normalized": lambda p: pysmooth.NormalizedSGD(p, 0.1),
    "normalized_tensor": lambda p: pysmooth.NormalizedSGD(p, 0.1, scope="tensor"),
    "signum": lambda p: pysmooth.Signum(p, 1e-2),
    "lion": lambda p: pysmooth.Lion(p, 1e-2),
    "ef_sign": lambda p: pysmooth.EFSGD(p, 0.1, ScaledSign(), max_norm=1.0),
    "ef_sign_global": lambda p: pysmooth.EFSGD(p, 0.1, ScaledSign(scope="global")),
    "clip21": lambda p: pysmooth.Clip21SGD2M(p, 0.1, tau=0.5),
    "norm_ef21_sign": lambda p: pysmooth.NormEF21SGDM(p, 0.1, ScaledSign()),
}
# In units of the parameters' largest value: sums are cut elsewhere, and rounded in another order.
BOUND = 2e-6


def _steps_agree() -> None:
    for layout, (mesh, placed) in meshes().items():
        for name, make in METHODS.items():
            start = values(1)
            ours = [p.requires_grad_() for p in cut(start, mesh, placed)]
            alone = [p.clone().requires_grad_() for p in start]
            optimizer, reference = make(ours), make(alone)
            for step in range(3):
                grads = values(10 + step, 0.7)
                for p, g in zip(ours, cut(grads, mesh, placed), strict=True):
                    p.grad = g
                for p, g in zip(alone, grads, strict=True):
                    p.grad = g.clone()
                optimizer.step()
                reference.step()
            assert optimizer.resolved_backend == BACKEND
            for p, q in zip(ours, alone, strict=True):
                error = (whole(p.detach()) - q.detach()).abs().max()
                assert error <= BOUND * q.abs().max(), (layout, name, float(error))
            for p, q in zip(ours, alone, strict=True):
                assert optimizer.state.get(p, {}).keys() == reference.state.get(q, {}).keys()
                for key, value in optimizer.state.get(p, {}).items():
                    expected = reference.state[q][key]
                    if isinstance(value, DTensor):
                        assert value.placements == p.placements  # type: ignore[attr-defined]
                        assert value.shape == p.shape
                    near = 1e-5 * float(expected.abs().max()) + 1e-30
                    assert float((whole(value) - expected).abs().max()) <= near, (layout, name, key)
            norm = optimizer.last_norm()
            expected_norm = reference.last_norm()
            assert (norm is None) == (expected_norm is None)
            if norm is not None and expected_norm is not None:
                torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
                assert agreed(norm), (layout, name)


def _clips_agree() -> None:
    for layout, (mesh, placed) in meshes().items():
        for norm_type in (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0):
            grads = values(3)
            params = [p.requires_grad_() for p in cut(values(1), mesh, placed)]
            for p, g in zip(params, cut(grads, mesh, placed), strict=True):
                p.grad = g
            alone = [nn.Parameter(g.clone()) for g in grads]
            for q in alone:
                q.grad = q.detach().clone()
            total = pysmooth.get_total_norm([p.grad for p in params], norm_type)  # type: ignore[misc]
            norm = pysmooth.clip_grad_norm_(params, 0.5, norm_type)
            expected = torch.nn.utils.clip_grad_norm_(alone, 0.5, norm_type)
            assert not isinstance(norm, DTensor)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, msg=layout)
            assert torch.equal(norm, total)
            assert agreed(norm)
            for p, q in zip(params, alone, strict=True):
                assert p.grad is not None
                assert q.grad is not None
                torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-7)
    mesh = init_device_mesh("cpu", (4,))
    partial = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    with pytest.raises(ValueError, match="gradient 0 is a DTensor with placement P"):
        pysmooth.get_total_norm([partial])


def _thin_and_complex() -> None:
    """A mesh dimension of one process cuts nothing; complex numbers have norms of their own."""
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("rows", "columns"))
    gen = torch.Generator().manual_seed(5)
    value = torch.randn(10, 3, generator=gen, dtype=torch.complex64)
    for norm_type in (2.0, 1.0, 3.0, math.inf):
        for t in (value, value.real.contiguous()):
            placed = distribute_tensor(t.clone(), mesh, [Shard(0), Shard(1)])
            norm = pysmooth.get_total_norm([placed], norm_type)
            expected = torch.linalg.vector_norm(t, norm_type)
            torch.testing.assert_close(norm, expected.to(norm.dtype), rtol=1e-6, atol=0)
            assert agreed(norm)


def _elsewhere() -> None:
    """Two processes hold a tensor; the other two are told that they do not."""
    half = DeviceMesh("cpu", [0, 1])
    t = distribute_tensor(torch.ones(8, 2), half, [Shard(0)])
    if dist.get_rank() < 2:
        assert float(pysmooth.get_total_norm([t])) == 4.0
    else:
        with pytest.raises(ValueError, match="gradient 0 is a DTensor on a mesh that this process"):
            pysmooth.get_total_norm([t])


def _a_state_that_is_taken_away() -> None:
    mesh = init_device_mesh("cpu", (4,))
    p = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]).requires_grad_()
    q = torch.ones(8, 3).requires_grad_()
    pair = [(pysmooth.AdamW([x], 0.1, max_norm=1.0), x) for x in (p, q)]
    for step in range(3):
        for optimizer, x in pair:
            g = torch.full((8, 3), 1.0 + step)
            x.grad = distribute_tensor(g, mesh, [Shard(0)]) if x is p else g
            if step == 2:
                del optimizer.state[x]["exp_avg"]
            optimizer.step()
    torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-6, atol=1e-7)


def _gradients_are_placed() -> None:
    """A gradient with another placement than its parameter's is redistributed."""
    mesh = init_device_mesh("cpu", (4,))
    start, g = values(1)[0], values(2)[0]
    for grad in (
        distribute_tensor(g.clone(), mesh, [Replicate()]),
        distribute_tensor(g.clone(), mesh, [Shard(1)]),
        DTensor.from_local(g / 4, mesh, [Partial()]),
    ):
        p = distribute_tensor(start.clone(), mesh, [Shard(0)]).requires_grad_()
        p.grad = grad
        pysmooth.ClipSGD([p], 0.1, max_norm=1.0).step()
        q = start.clone().requires_grad_()
        q.grad = g.clone()
        pysmooth.ClipSGD([q], 0.1, max_norm=1.0).step()
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-6, atol=1e-7)


def _nonfinite() -> None:
    """One process has a NaN: all skip the step, or all raise, with the parameter's name."""
    mesh = init_device_mesh("cpu", (4,))
    for policy in ("skip", "raise"):
        p = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]).requires_grad_()
        optimizer = pysmooth.ClipSGD([("weight", p)], 0.1, momentum=0.9, nonfinite=policy)
        g = torch.ones(8, 3)
        g[7, 1] = math.nan
        p.grad = distribute_tensor(g, mesh, [Shard(0)])
        if policy == "skip":
            optimizer.step()
            assert optimizer.skipped_steps() == 1
        else:
            with pytest.raises(pysmooth.NonFiniteGradientError, match="'weight'"):
                optimizer.step()
        assert torch.equal(whole(p.detach()), torch.ones(8, 3))
        assert not optimizer.state
        p.grad = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)])
        optimizer.step()
        assert torch.allclose(whole(p.detach()), torch.tensor(0.9))
    q = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]).requires_grad_()
    if dist.get_rank() != 2:
        q.grad = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)], src_data_rank=None)
    with pytest.raises(RuntimeError, match="'weight' has a gradient in some processes"):
        pysmooth.ClipSGD([("weight", q)], 0.1, max_norm=1.0).step()
    assert torch.equal(whole(q.detach()), torch.ones(8, 3))


def _stages() -> None:
    """Two stages of a pipeline, two processes each: the norm is that of the whole model."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, everything = square.get_local_rank("pp"), values(1)
    mine = slice(0, 3) if stage == 0 else slice(3, None)
    pp = square.get_group("pp")
    for name in ("clip_global", "skip", "adagrad_norm", "normalized", "ef_sign_global"):
        ours = [p.requires_grad_() for p in cut(everything[mine], square["dp"], _rows)]
        alone = [p.clone().requires_grad_() for p in everything]
        optimizer, reference = METHODS[name](ours), METHODS[name](alone)
        set_sharding(optimizer, process_group=pp)
        for step in range(3):
            grads = values(10 + step)
            if name == "skip" and step == 1:
                grads[0][3, 2] = math.inf  # in stage 0 only
            for p, g in zip(ours, cut(grads[mine], square["dp"], _rows), strict=True):
                p.grad = g
            for p, g in zip(alone, grads, strict=True):
                p.grad = g
            optimizer.step()
            reference.step()
        for p, q in zip(ours, alone[mine], strict=True):
            assert float((whole(p.detach()) - q.detach()).abs().max()) <= BOUND * q.abs().max(), (
                name
            )
        if (norm := optimizer.last_norm()) is not None:
            assert agreed(norm)
        assert optimizer.skipped_steps() == reference.skipped_steps() == int(name == "skip")
    grads = values(4)
    ours = cut(grads[mine], square["dp"], _rows)
    norm = pysmooth.get_total_norm(ours, process_group=pp)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(grads), rtol=1e-6, atol=0)
    assert agreed(norm)


def _rows(shape: torch.Size) -> list[Any]:
    return [Shard(0)]


def _top_k() -> None:
    """Among all shards of a tensor, with ties; or per shard."""
    mesh = init_device_mesh("cpu", (4,))
    for make in (
        lambda p: pysmooth.EFSGD(p, 0.1, TopK(ratio=0.05)),
        lambda p: pysmooth.EF21SGDM(p, 0.1, TopK(k=7), normalize=True),
    ):
        for tied in (False, True):
            start = values(1)
            ours = [p.requires_grad_() for p in cut(start, mesh, _rows)]
            alone = [p.clone().requires_grad_() for p in start]
            optimizer, reference = make(ours), make(alone)
            set_sharding(optimizer, compress="global")
            for step in range(3):
                grads = values(10 + step)
                if tied:
                    grads = [g.round() for g in grads]
                for p, g in zip(ours, cut(grads, mesh, _rows), strict=True):
                    p.grad = g
                for p, g in zip(alone, grads, strict=True):
                    p.grad = g.clone()
                optimizer.step()
                reference.step()
            for p, q in zip(ours, alone, strict=True):
                torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-6, atol=1e-7)
    for rows in (4000, 40000):  # a sample suggests what is large in a whole tensor of this size
        g = torch.randn(rows, 3, generator=torch.Generator().manual_seed(4))
        p = distribute_tensor(torch.zeros(rows, 3), mesh, [Shard(0)]).requires_grad_()
        p.grad = distribute_tensor(g, mesh, [Shard(0)])
        optimizer = pysmooth.EFSGD([p], 1.0, TopK(k=100))
        set_sharding(optimizer, compress="global")
        optimizer.step()
        largest = torch.zeros(rows, 3).view(-1)
        at = g.view(-1).abs().topk(100).indices
        largest[at] = -g.view(-1)[at]
        assert torch.equal(whole(p.detach()).view(-1), largest)
    # Parts of other sizes than torch's, with equals over the ends of them.
    whole_g = (torch.arange(24.0) // 5 + 1).view(8, 3)
    g = whole_g.split([1, 3, 2, 2])[dist.get_rank()]
    p, p_grad = (
        DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=whole_g.shape, stride=(3, 1))
        for x in (torch.zeros_like(g), g)
    )
    p.requires_grad_().grad = p_grad
    optimizer = pysmooth.EFSGD([p], 1.0, TopK(k=6))
    set_sharding(optimizer, compress="global")
    optimizer.step()
    chosen = torch.zeros(24)  # the four fives, and of the fours those that come first
    chosen[15:17], chosen[20:] = -4.0, -5.0
    assert torch.equal(
        p.to_local().detach(), chosen.view(8, 3).split([1, 3, 2, 2])[dist.get_rank()]
    )
    p = distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)]).requires_grad_()
    p.grad = distribute_tensor(torch.arange(24.0).view(8, 3) + 1, mesh, [Shard(0)])
    optimizer = pysmooth.EFSGD([p], 1.0, TopK(k=1))
    set_sharding(optimizer, compress="per_shard")
    optimizer.step()
    expected = torch.zeros(8, 3)
    expected[1::2, 2] = -torch.tensor([6.0, 12.0, 18.0, 24.0])
    assert torch.equal(whole(p.detach()), expected)


def _refusals() -> None:
    mesh = init_device_mesh("cpu", (4,))

    def fails(
        match: str, make: Make, shape: tuple[int, ...] = (8, 8), dim: int = 0, **kwargs: Any
    ) -> None:
        p = distribute_tensor(torch.ones(shape), mesh, [Shard(dim)]).requires_grad_()
        p.grad = distribute_tensor(torch.ones(shape), mesh, [Shard(dim)])
        optimizer = make([p])
        if kwargs:
            set_sharding(optimizer, **kwargs)
        with pytest.raises((ValueError, pysmooth.BackendError), match=match):
            optimizer.step()
        assert torch.equal(whole(p.detach()), torch.ones(shape))
        assert not optimizer.state

    name = "parameter 'group 0, parameter 0'"
    fails(f"TopK does not go with {name}", lambda p: pysmooth.EFSGD(p, 0.1, TopK(k=2)))
    fails("QSGD does not go", lambda p: pysmooth.EF21(p, 0.1, QSGD(levels=4)))
    fails(
        "RandK compress='global' does not go",
        lambda p: pysmooth.EFSGD(p, 0.1, RandK(k=2)),
        compress="global",
    )
    fails(
        "cut along dimension 0",
        lambda p: pysmooth.EFSGD(p, 0.1, TopK(k=2)),
        dim=1,
        compress="global",
    )
    fails("whole rows", lambda p: pysmooth.ClipSGD(p, 0.1, clip="agc"), shape=(8,))
    fails("whole rows", lambda p: pysmooth.ClipSGD(p, 0.1, clip="agc"), dim=1)
    fails("noise_std", lambda p: pysmooth.Clip21(p, 0.1, tau=1.0, noise_std=0.1))
    fails(
        "the eager backend takes no DTensor",
        lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=1.0, backend="eager"),
    )
    chain = pysmooth.chain(pysmooth.parts.Sign(), pysmooth.parts.Clip(1.0))
    fails(
        "the eager backend takes no DTensor",
        lambda p: pysmooth.compose(p, chain, 0.1, backend="eager"),
    )
    p = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]).requires_grad_()
    p.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match="has a gradient that is not a DTensor"):
        pysmooth.ClipSGD([p], 0.1).step()
    with pytest.raises(ValueError, match="compress must be one of"):
        set_sharding(
            pysmooth.ClipSGD([torch.ones(2, requires_grad=True)], 0.1),
            compress="all",  # type: ignore[arg-type]
        )
    with pytest.raises(TypeError, match="one of pysmooth's"):
        set_sharding(torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1))


def _copies() -> None:
    """What an optimizer was told about its parameters comes along, or a pickle is refused."""
    group = dist.new_group(list(range(4)))
    assert group is not None
    params = [torch.nn.Parameter(torch.full((5,), float(dist.get_rank() + 1)))]
    optimizer = pysmooth.ClipSGD(params, 1.0, momentum=0.5, max_norm=0.1)
    set_sharding(optimizer, process_group=group)
    for _ in range(2):
        params[0].grad = params[0].detach().clone()
        optimizer.step()
    other = copy.deepcopy(optimizer)
    assert other.sharding is optimizer.sharding
    for it in (optimizer, other):
        p = it.param_groups[0]["params"][0]
        p.grad = p.detach().clone()
        it.step()
        # Of all stages' parameters: clipped much more than this one alone would be.
        assert it.last_norm() == optimizer.last_norm()
    assert torch.equal(other.param_groups[0]["params"][0], params[0])
    with pytest.raises(TypeError, match="process_group"):
        pickle.dumps(optimizer)
    set_sharding(optimizer, compress="per_shard")
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.sharding == optimizer.sharding


def _triton_refuses() -> None:
    """What would take more than sums of tensors."""
    mesh = init_device_mesh("cpu", (4,))
    group = dist.new_group(list(range(4)))
    cases: list[tuple[str, Make, dict[str, Any]]] = [
        ("compress='global'", lambda p: pysmooth.EFSGD(p, 0.1, TopK(k=2)), {"compress": "global"}),
        (
            "process_group",
            lambda p: pysmooth.ClipSGD(p, 0.1, max_norm=1.0),
            {"process_group": group},
        ),
    ]
    for what, make, given in cases:
        p = distribute_tensor(torch.ones(8, 3), mesh, _rows(torch.Size())).requires_grad_()
        p.grad = distribute_tensor(torch.ones(8, 3), mesh, _rows(torch.Size()))
        optimizer = make([p])
        set_sharding(optimizer, **given)
        with pytest.raises(pysmooth.BackendError, match=f"triton backend takes no {what}"):
            optimizer.step()
        assert torch.equal(whole(p.detach()), torch.ones(8, 3))
        assert not optimizer.state


@pytest.mark.interpreted
@pytest.mark.emulated
def test_four_processes(tmp_path: Path) -> None:
    """All cases that need nothing but a process group, in one start of four processes."""
    cases = [_steps_agree, _gradients_are_placed, _nonfinite, _a_state_that_is_taken_away]
    if BACKEND == "triton":
        cases += [_triton_refuses]
    else:
        cases += [_clips_agree, _thin_and_complex, _elsewhere, _stages, _top_k, _refusals, _copies]
        cases += [there_and_back]
    run(4, str(tmp_path / "store"), *cases)
