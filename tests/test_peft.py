"""LoRA-SB: initialisation, the optimal projection, merging, saving, federated averaging."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysmooth
from pysmooth import federated, peft
from pysmooth.peft.gradients import truncated_svd


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Linear(8, 3)).to(dtype)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def data(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    make = {"generator": g, "dtype": dtype}
    return [(torch.randn(16, 6, **make), torch.randn(16, 3, **make)) for _ in range(count)]  # type: ignore[arg-type]


def gradient(model: nn.Module, weight: nn.Parameter, batches: Any) -> Tensor:
    total = torch.zeros_like(weight)
    for batch in batches:
        total += torch.autograd.grad(loss(model, batch), weight)[0]
    return total


# ---- the first gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_collects_sums_of_gradients(at_once: int | None, count: int) -> None:
    model, batches = model_of(), data(count)
    model[0].bias.requires_grad_(False)
    kept = model[0].weight.grad = torch.ones_like(model[0].weight)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    found = {}
    peft.collect_gradients(
        *(model, weights, loss, batches),
        lambda name, g: found.__setitem__(name, g.clone()),
        at_once=at_once,
    )
    for name, p in weights.items():
        torch.testing.assert_close(found[name], gradient(model, p, batches))
    assert not model[0].bias.requires_grad
    assert model[2].bias.requires_grad
    assert model[0].weight.grad is kept  # everything is as it was
    assert model[2].weight.grad is None


def test_no_more_than_one_gradient_is_there() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def use(name: str, g: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(g.untyped_storage()))  # type: ignore[arg-type]
        gc.collect()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        most = max(most, len(grads))

    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    x = torch.randn(4, 32)
    peft.collect_gradients(model, weights, lambda m, b: m(b).sum(), [x], use)
    assert len(alive) == 12
    assert most == 1


def test_layers_without_gradient_are_named() -> None:
    model = model_of()
    weights = {"0": model[0].weight, "other": nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(ValueError, match="other"):
        peft.collect_gradients(model, weights, loss, data(), lambda name, g: None)
    with pytest.raises(ValueError, match="batches"):
        peft.collect_gradients(model, weights, loss, [], lambda name, g: None)
    assert model[0].weight.requires_grad


def test_truncated_svd() -> None:
    x = torch.randn(20, 5, dtype=torch.float64) @ torch.randn(5, 30, dtype=torch.float64)
    u, s, vh = truncated_svd(x, 5)
    torch.testing.assert_close(u @ torch.diag(s) @ vh, x)
    low = torch.randn(600, 8) @ torch.randn(8, 700)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    u, s, vh = truncated_svd(low, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert float((u @ torch.diag(s) @ vh - low).norm() / low.norm()) < 1e-5
    assert float((u.T @ u - torch.eye(8)).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="rank"):
        truncated_svd(x, 21)


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init_grad", ["sign", "raw"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_starts_one_step_of_full_fine_tuning_away(init_grad: Any, scale: float) -> None:
    """With full rank B R A is the whole first step; B and A are orthonormal."""
    model, batches, step = model_of(), data(), 1e-2
    before = copy.deepcopy(model)
    g = gradient(model, model[2].weight, batches)
    peft.lora_sb(
        *(model, loss, batches),
        rank=8,
        step=step,
        targets=["2"],
        init_grad=init_grad,
        scale=scale,
    )
    (layer,) = peft.adapters(model)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(layer.latent.B.T @ layer.latent.B, eye)
    torch.testing.assert_close(layer.a @ layer.a.T, eye)
    expected = -step * (g.sign() if init_grad == "sign" else g)
    torch.testing.assert_close(layer.delta(), expected)
    before[2].weight.data += expected
    torch.testing.assert_close(model(batches[0][0]), before(batches[0][0]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.latent.R"]


def test_optimal_projection_is_the_least_squares_solution() -> None:
    model, batches = model_of(), data(1)
    peft.lora_xs(model, rank=4, targets=["2"], scale=1.5, std=0.1)
    (layer,) = peft.adapters(model)
    layer.latent.B.copy_(torch.randn(8, 4, dtype=torch.float64))  # far from orthonormal
    layer.a.copy_(torch.randn(4, 10, dtype=torch.float64))
    full = copy.deepcopy(model)
    (twin,) = peft.adapters(full)
    merged = nn.Linear(10, 8).to(torch.float64)
    merged.weight.data = twin.module.base.weight + twin.delta()  # type: ignore[union-attr,operator]
    merged.bias.data = twin.module.base.bias.data  # type: ignore[union-attr]
    full[2] = merged
    g = gradient(full, merged.weight, batches)
    for _ in range(2):  # asked for twice it is still done once
        peft.optimal_projection(model)
    loss(model, batches[0]).backward()  # type: ignore[no-untyped-call]
    # min over X of ||s B X A - G||: vec(s B X A) = s (B kron A') vec X.
    design = 1.5 * torch.kron(layer.latent.B, layer.a.T.contiguous())
    solution = torch.linalg.lstsq(design, g.reshape(-1, 1)).solution.view(4, 4)
    torch.testing.assert_close(layer.latent.R.grad, solution)


def test_orthonormal_factors_need_no_projection() -> None:
    model, batches = model_of(), data()
    peft.lora_sb(model, loss, batches, rank=3, step=1e-2, targets=["0", "2"])
    loss(model, batches[0]).backward()  # type: ignore[no-untyped-call]
    plain = [layer.latent.R.grad.clone() for layer in peft.adapters(model)]  # type: ignore[union-attr]
    model.zero_grad()
    peft.optimal_projection(model)
    loss(model, batches[0]).backward()  # type: ignore[no-untyped-call]
    for layer, g in zip(peft.adapters(model), plain, strict=True):
        torch.testing.assert_close(layer.latent.R.grad, g)


def train(model: nn.Module, steps: int = 20) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = pysmooth.AdamW(trained, 1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, data()[0])
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_and_unload(dtype: torch.dtype) -> None:
    model, batches = model_of(dtype), data(dtype=dtype)
    before = copy.deepcopy(model)
    peft.lora_sb(model, loss, batches, rank=3, step=1e-2)
    if dtype == torch.float64:
        losses = train(model)
        assert losses[-1] < 0.9 * losses[0]
    x = batches[0][0]
    out = model(x)
    kept = copy.deepcopy(model)
    peft.unload(model)
    assert not list(peft.adapters(model))
    assert [type(m) for m in model] == [type(m) for m in before]
    torch.testing.assert_close(model(x), out)
    peft.unload(kept, merge=False)
    assert torch.equal(kept(x), before(x))


def test_save_and_load(tmp_path: Path) -> None:
    base, batches = model_of(), data()
    model = copy.deepcopy(base)
    peft.lora_sb(model, loss, batches, rank=3, step=1e-2, targets=["0", "2"], scale=2.0)
    train(model, 3)
    torch.save(peft.adapter_state(model), tmp_path / "adapter")
    state = torch.load(tmp_path / "adapter", weights_only=True)
    fresh = copy.deepcopy(base)
    peft.load_adapter_state(fresh, state)
    assert torch.equal(fresh(batches[0][0]), model(batches[0][0]))
    assert train(fresh) == train(model)
    peft.load_adapter_state(fresh, state)
    peft.unload(fresh, merge=False)
    for bad, match in [
        ({k: v for k, v in state.items() if k != "0.A"}, "adapter_state"),
        ({k.replace("0.", "3."): v for k, v in state.items()}, "rank|shapes"),
        ({k.replace("0.", "9."): v for k, v in state.items()}, "9"),
    ]:
        with pytest.raises((ValueError, KeyError), match=match):
            peft.load_adapter_state(fresh, bad)
        assert not list(peft.adapters(fresh))
    for targets, rank, match in [
        (["0", "2"], 3, "its scale"),
        (["0", "2"], 2, "0: shapes differ"),
        (["2"], 3, r"other layers have adapters: \['0'\]"),
    ]:
        other = copy.deepcopy(base)
        peft.lora_xs(other, rank=rank, targets=targets)
        before = peft.adapter_state(other)
        with pytest.raises(ValueError, match=match):
            peft.load_adapter_state(other, state)
        after = peft.adapter_state(other)
        assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rank": 9}, "rank"),
        ({"rank": 0}, "rank"),
        ({"rank": 2, "targets": ["nothing"]}, "nothing"),
        ({"rank": 2, "step": 0.0}, "step"),
        ({"rank": 2, "init_grad": "abs"}, "init_grad"),
    ],
)
def test_bad_arguments_change_nothing(kwargs: Any, match: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=match):
        peft.lora_sb(model, loss, data(), **{"step": 0.1, **kwargs})
    assert all(p.requires_grad for p in model.parameters())
    peft.lora_xs(model, rank=2)
    with pytest.raises(ValueError, match="adapters already"):
        peft.lora_xs(model, rank=2)


# ---- averaging ----------------------------------------------------------------------------------


def clients_of(start: nn.Module, count: int = 3) -> list[nn.Module]:
    out = []
    for i in range(count):
        model = copy.deepcopy(start)
        train(model, 3 + 4 * i)
        out.append(model)
    return out


def test_the_mean_of_r_is_the_mean_of_the_models() -> None:
    start = model_of()
    peft.lora_sb(start, loss, data(), rank=2, step=1e-2, targets=["0", "2"])
    models, weights = clients_of(start), [1.0, 2.0, 5.0]
    mean = peft.average_adapters([peft.adapter_state(m) for m in models], weights)
    averaged = peft.load_adapter_state(copy.deepcopy(start), mean)
    for name in ("0", "2"):
        deltas = [next(a for a in peft.adapters(m) if a.name == name).delta() for m in models]
        expected = sum(w / 8 * d for w, d in zip(weights, deltas, strict=True))
        found = next(a for a in peft.adapters(averaged) if a.name == name).delta()
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
        assert float((deltas[0] - deltas[2]).norm()) > 0.01 * float(deltas[0].norm())
    order = [peft.adapter_state(models[i]) for i in (2, 0, 1)]
    again = peft.average_adapters(order, [5.0, 1.0, 2.0])
    torch.testing.assert_close(again["0.R"], mean["0.R"], rtol=1e-14, atol=0)


def test_federated_averaging_sends_r_alone() -> None:
    start = model_of()
    peft.lora_sb(start, loss, data(), rank=2, step=1e-2, targets=["0", "2"])
    models = [copy.deepcopy(start) for _ in range(3)]
    clients = {
        i: federated.ModelClient(m, nn.functional.mse_loss, *data(3)[i])
        for i, m in enumerate(models)
    }
    x = clients[0].vector()
    assert len(x) == 2 * 2**2
    server = federated.Server(federated.FedAvg(lr=0.1, local_steps=3), x)
    server.round(clients)
    ends = []
    for i in clients:
        client = federated.ModelClient(copy.deepcopy(start), nn.functional.mse_loss, *data(3)[i])
        y = x.clone()
        for _ in range(3):
            y -= 0.1 * client.grad(y, None)
        client.load(y)
        ends.append(next(iter(peft.adapters(client.model))).delta())
    clients[0].load(server.x)
    found = next(iter(peft.adapters(clients[0].model))).delta()
    torch.testing.assert_close(found, torch.stack(ends).mean(0), rtol=1e-12, atol=1e-14)


def test_what_cannot_be_averaged() -> None:
    start = model_of()
    peft.lora_xs(start, rank=2)
    state = peft.adapter_state(start)
    for states, weights, match in [
        ([], None, "at least one"),
        ([state], [1.0, 2.0], "weights"),
        ([state, state], [-1.0, 2.0], "weights"),
        ([state, {**state, "0.A": state["0.A"] * 2}], None, r"0\.A differs"),
        ([state, {k: v for k, v in state.items() if "0." not in k}], None, "different adapters"),
    ]:
        with pytest.raises(ValueError, match=match):
            peft.average_adapters(states, weights)


# ---- PEFT ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("conv", [False, True])
def test_on_a_model_of_peft(conv: bool) -> None:
    """The same adapters as on the plain model; PEFT's own merge takes them."""
    library = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    base, batches = model_of(torch.float32), data(dtype=torch.float32)
    plain = copy.deepcopy(base)
    if conv:  # GPT-2's linear layer keeps the transpose
        twin = Conv1D(8, 10)
        twin.weight.data, twin.bias.data = base[2].weight.data.T.contiguous(), base[2].bias.data
        base[2] = twin
    config = library.LoraConfig(r=3, lora_alpha=6, target_modules=["2"], fan_in_fan_out=conv)
    wrapped = library.get_peft_model(base, config)
    options: Any = {"rank": 3, "step": 1e-2}
    peft.lora_sb(wrapped, loss, batches, **options)
    peft.lora_sb(plain, loss, batches, targets=["2"], scale=2.0, **options)
    x = batches[0][0]
    torch.testing.assert_close(wrapped(x), plain(x), rtol=1e-4, atol=1e-5)
    (one,), (other,) = peft.adapters(wrapped), peft.adapters(plain)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert [p.numel() for p in trained] == [9]
    for model in (wrapped, plain):
        loss(model, batches[0]).backward()  # type: ignore[no-untyped-call]
    sign = torch.sign((one.latent.B * other.latent.B).sum(0))  # of singular vectors
    torch.testing.assert_close(
        one.latent.R.grad, other.latent.R.grad * sign * sign[:, None], rtol=1e-3, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"use model\.merge_and_unload"):
        peft.unload(wrapped)
    state = peft.adapter_state(wrapped)
    fresh = library.get_peft_model(copy.deepcopy(wrapped.unload()), config)
    peft.load_adapter_state(fresh, state)
    out = fresh(x)
    merged = fresh.merge_and_unload()
    torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_peft_with_another_rank_or_trained() -> None:
    library = pytest.importorskip("peft")
    config = library.LoraConfig(r=3, target_modules=["2"])
    wrapped = library.get_peft_model(model_of(torch.float32), config)
    with pytest.raises(ValueError, match="rank 3, not 2"):
        peft.lora_xs(wrapped, rank=2)
    torch.nn.init.ones_(wrapped.base_model.model[2].lora_B["default"].weight)
    with pytest.raises(ValueError, match="has been trained"):
        peft.lora_xs(wrapped, rank=3)
