"""Hooks of a single process are pysmooth's own optimizers; states that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysmooth
from pysmooth import compressors
from pysmooth.distributed import (
    EF14,
    EF21,
    Clip21SGD2M,
    CompressedState,
    Method,
    TwoWaySign,
    compressed_hook,
)
from pysmooth.distributed.handshake import MismatchError, shake_hands
from pysmooth.distributed.kept import new_slot
from pysmooth.distributed.method import Context, Slot

TOP = compressors.TopK(ratio=0.1)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 4))


def losses(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def hooked(
    method: Method, optimizer: Callable[..., torch.optim.Optimizer]
) -> tuple[nn.Module, torch.optim.Optimizer, CompressedState, nn.Module]:
    model = make()
    ddp = DistributedDataParallel(model)
    opt = optimizer(model.parameters())
    state = CompressedState(ddp, opt, method, dense_below=0)
    ddp.register_comm_hook(state, compressed_hook)
    return ddp, opt, state, model


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize(
    ("method", "optimizer", "twin"),
    [
        (EF14(TOP), sgd, lambda p: pysmooth.EFSGD(p, 0.1, TOP)),
        (
            EF14(compressors.ScaledSign(), momentum=0.9),
            sgd,
            lambda p: pysmooth.EFSGD(p, 0.1, compressors.ScaledSign(), momentum=0.9),
        ),
        (EF21(TOP), sgd, lambda p: pysmooth.EF21(p, 0.1, TOP)),
        (EF21(TOP, eta=0.3), sgd, lambda p: pysmooth.EF21SGDM(p, 0.1, TOP, eta=0.3)),
        (
            EF21(TOP),
            lambda p: pysmooth.NormalizedSGD(p, 0.1, momentum=0.0),
            lambda p: pysmooth.NormEF21(p, 0.1, TOP),
        ),
        (
            EF21(TOP, eta=0.3),
            lambda p: pysmooth.NormalizedSGD(p, 0.1, momentum=0.0),
            lambda p: pysmooth.NormEF21SGDM(p, 0.1, TOP, eta=0.3),
        ),
        (
            Clip21SGD2M(0.05, beta=0.2, beta_hat=0.5),
            sgd,
            lambda p: pysmooth.Clip21SGD2M(p, 0.1, tau=0.05, beta=0.2, beta_hat=0.5),
        ),
    ],
    ids=["ef14", "ef14 sign", "ef21", "ef21-sgdm", "norm-ef21", "norm-ef21-sgdm", "clip21"],
)
def test_one_worker_is_the_optimizer(method: Method, optimizer: Any, twin: Any) -> None:
    ddp, opt, _, model = hooked(method, optimizer)
    other = make()
    fused = twin(other.parameters())
    for step in range(20):
        for net, o in ((ddp, opt), (other, fused)):
            o.zero_grad()
            losses(net, step).backward()
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_mean_of_estimates_is_the_estimate() -> None:
    ddp, opt, state, _ = hooked(EF21(TOP, eta=0.3), sgd)
    for step in range(50):
        opt.zero_grad()
        losses(ddp, step).backward()
        opt.step()
    for slot in state._slots:
        assert torch.equal(slot.states["estimate"], slot.states["mean_estimate"])


def test_momenta_start_anew_among_other_ranks() -> None:
    method = EF21(TOP, eta=0.1)
    slot = Slot("w", 0, 50, torch.device("cpu"), steps=3)
    slot.states = {key: torch.randn(50) for key in ("estimate", "mean_estimate", "momentum_buffer")}
    method.regroup(slot)
    grad = torch.randn(50)
    message = torch.zeros(method.size(50, 1), dtype=torch.uint8)
    method.encode(Context(0, 1, 4), slot, grad, message)
    assert torch.equal(slot.staged["momentum_buffer"], grad)


def test_states_that_do_not_fit_are_refused() -> None:
    ddp, opt, state, _ = hooked(TwoWaySign(), sgd)
    losses(ddp, 0).backward()
    opt.step()
    name = "2.weight"
    for spoil, says in (
        (lambda s: s["states"][name].update(server_residual=torch.zeros(3)), "server_residual"),
        (lambda s: s["states"][name].update(residual="x"), "residual"),
        (lambda s: s["states"][name].pop("steps"), "steps"),
        (lambda s: s["states"].pop(name), name),
        (lambda s: s.update(rank=5), "rank 5"),
        (lambda s: s.update(part=(1, 2)), "is of part 1 of 2 .* needs that of part 0 of 1"),
        (lambda s: s.pop("world_size"), "world_size"),
    ):
        saved = state.state_dict()
        saved["steps"] = 77
        spoil(saved)
        before = {s.name: dict(s.states) for s in state._slots}
        with pytest.raises(ValueError, match=says):
            state.load_state_dict(saved)
        assert state.steps == 1
        assert all(s.states[k] is v for s in state._slots for k, v in before[s.name].items())


def test_parameters_that_no_message_could_carry() -> None:
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter 'w' has 2\*\*32 elements or more"):
        new_slot("w", 0, w, 2**32)
    with pytest.raises(TypeError, match="parameter 'w' is complex"):
        new_slot("w", 0, nn.Parameter(torch.ones(3, dtype=torch.complex64)), 3)


def test_a_parameter_without_a_learning_rate_is_named() -> None:
    """EF14's residual is in the parameter's units: the hook asks the optimizer."""
    ddp, opt, _, _ = hooked(EF14(TOP), sgd)
    del opt.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is not in the optimizer"):
        losses(ddp, 0).backward()


def test_an_overflow_stays_out_of_the_residual() -> None:
    ddp, opt, state, model = hooked(EF14(TOP), sgd)
    losses(ddp, 0).backward()
    opt.step()
    kept = {s.name: s.states["residual"].clone() for s in state._slots}
    opt.param_groups[0]["lr"] = 3e38
    (losses(ddp, 1) * 1e6).backward()
    opt.step()
    assert state.dropped == 1
    for s in state._slots:
        assert torch.equal(s.states["residual"], kept[s.name])
    del model


def test_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"method": "EF14()", "parameter 'w'": "torch.float32 of shape (3,)"}

    def heard(theirs: dict[str, str]) -> None:
        def gather(everybody: list[dict[str, str]], mine: dict[str, str], group: object) -> None:
            everybody[:] = [mine, theirs]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        shake_hands(about, None)

    heard(dict(about))
    with pytest.raises(MismatchError, match=r"parameter 'w' is torch.float32 .* torch.bfloat16"):
        heard({**about, "parameter 'w'": "torch.bfloat16 of shape (3,)"})
    with pytest.raises(MismatchError, match="missing"):
        heard({"method": "EF14()"})
    with pytest.raises(MismatchError, match="order"):
        heard(dict(reversed(about.items())))
