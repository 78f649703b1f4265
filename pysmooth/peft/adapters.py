"""LoRA-SB and LoRA-XS: adapters on a model, and off it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.aggregate import tree_sum
from .gradients import InitGrad, collect_gradients, first_step, truncated_svd
from .latent import Adapted, Latent, LatentLinear


@torch.no_grad()
def lora_sb(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    rank: int,
    step: float,
    targets: Sequence[str] | None = None,
    train: Sequence[str] = (),
    init_grad: InitGrad = "sign",
    scale: float = 1.0,
    adapter: str = "default",
    at_once: int | None = None,
) -> nn.Module:
    """Puts LoRA-SB adapters on a model: W + scale * B R A, of which only R is trained.

    Equivalent, for each layer, to::

        G = sum over batches of the gradient of the loss with respect to W
        U, S, V = svd(-step * sign(G))                 # or -step * G
        B, A, R = U[:, :rank], V[:rank], diag(S[:rank]) / scale

    so that training begins about one step of full fine-tuning away from W, and gradients of R are
    the best approximation to those of W that B R A can make (`optimal_projection`).

    Args:
        model: changed in place. Its linear layers, or those that PEFT has put LoRA on (of the same
            rank; their `scaling` counts, not `scale`; their B must still be 0). All other
            parameters are frozen.
        loss: `loss(model, batch)`, summed or averaged over the batch.
        batches: for the first gradient.
        rank: r.
        step: lr / (warmup_ratio * total_steps) in the authors' code.
        targets: names of layers, or what they end with after a dot; None for all.
        train: beginnings of names of parameters that stay trained, such as a head's.
        init_grad: "sign", AdamW's first step; or "raw", SGD's, better with few samples.
        scale: s.
        adapter: PEFT's name of the adapter.
        at_once: of how many layers gradients are summed up at a time: see `collect_gradients`.

    Returns:
        The model.

    Raises:
        ValueError: no layer has one of these names, a rank is too large, or is not that of PEFT.

    Source: arXiv:2411.19557.
    """
    if init_grad not in ("sign", "raw"):
        raise ValueError(f'init_grad must be "sign" or "raw"; got {init_grad!r}')
    if not step > 0:
        raise ValueError(f"step must be greater than 0; got {step}")
    found = _layers(model, targets, rank, adapter)
    factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def use(name: str, gradient: Tensor) -> None:
        g = gradient.T if found[name].transposed else gradient
        factors[name] = truncated_svd(first_step(g, step, init_grad), rank)

    weights = {name: layer.weight for name, layer in found.items()}
    collect_gradients(model, weights, loss, batches, use, at_once=at_once)
    kept = [name for name, _ in model.named_parameters() if name.startswith(tuple(train))]
    for name, layer in found.items():
        u, s, vh = factors.pop(name)
        layer.attach(model, vh, u, torch.diag(s) / layer.scale(scale), scale)
    return _freeze(model, kept if train else [], adapter)


@torch.no_grad()
def lora_xs(
    model: nn.Module,
    *,
    rank: int,
    targets: Sequence[str] | None = None,
    train: Sequence[str] = (),
    std: float = 1e-5,
    scale: float = 1.0,
    adapter: str = "default",
    seed: int = 0,
) -> nn.Module:
    """Puts LoRA-XS adapters on a model, the baseline: B and A from the weight, R near 0.

    Equivalent, for each layer, to::

        U, S, V = svd(W)
        B, A, R = U[:, :rank] * S[:rank], V[:rank], std * randn(rank, rank)

    Args:
        model: as in `lora_sb`.
        rank: r.
        targets: as in `lora_sb`.
        train: as there.
        std: of R at the start.
        scale: s.
        adapter: PEFT's name of the adapter.
        seed: of R.

    Source: arXiv:2405.17604.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [name for name, _ in model.named_parameters() if name.startswith(tuple(train))]
    for layer in _layers(model, targets, rank, adapter).values():
        w = layer.weight.T if layer.transposed else layer.weight
        u, s, vh = truncated_svd(w, rank)
        r = torch.randn(rank, rank, generator=generator).to(w.device) * std
        layer.attach(model, vh, u * s, r, scale)
    return _freeze(model, kept if train else [], adapter)


def adapters(model: nn.Module, adapter: str = "default") -> Iterator[Adapted]:
    """The adapted layers of a model.

    Args:
        model: with adapters, or without any.
        adapter: PEFT's name of the adapter.
    """
    for name, module in model.named_modules():
        lora_b: Any = getattr(module, "lora_B", {})
        if isinstance(module, LatentLinear) or (
            adapter in lora_b and isinstance(lora_b[adapter], Latent)
        ):
            yield Adapted(name, module, adapter)


def optimal_projection(model: nn.Module, adapter: str = "default") -> None:
    """Makes gradients of R those whose step moves W as near to its own gradient as B R A can.

    Equivalent to::

        R.grad = inv(B' B) @ R.grad @ inv(A A') / scale**2

    the minimiser of ||scale * B X A - G||, G the gradient with respect to W. Where B and A are
    orthonormal and scale is 1, as after `lora_sb`, it changes nothing. It is done in backward, on r
    x r numbers in cache: the optimizer's fused pass over all R needs no other.

    Args:
        model: with adapters.
        adapter: PEFT's name of the adapter.

    Source: arXiv:2411.19557, theorem 3.
    """
    for layer in adapters(model, adapter):
        layer.latent.project(layer.a, layer.scale)


@torch.no_grad()
def unload(model: nn.Module, *, merge: bool = True) -> nn.Module:
    """Takes the adapters off again. Those on a PEFT model: `model.merge_and_unload()`.

    Args:
        model: changed in place.
        merge: add scale * B R A to the weights first, in float64; else they are what they were.
    """
    for layer in list(adapters(model)):
        if not isinstance(layer.module, LatentLinear):
            raise ValueError(f"{layer.name} is PEFT's: use model.merge_and_unload()")
        base = layer.module.base
        if merge:
            base.weight.copy_((base.weight.double() + layer.delta()).to(base.weight.dtype))
        _replace(model, layer.name, base)
    return model


def adapter_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of R, B and A of every adapted layer, and scale, for torch.save.

    Args:
        model: with adapters.
        adapter: PEFT's name of the adapter.
    """
    out: dict[str, Tensor] = {}
    for layer in adapters(model, adapter):
        parts = {"R": layer.latent.R, "B": layer.latent.B, "A": layer.a}
        out |= {f"{layer.name}.{key}": x.detach().clone() for key, x in parts.items()}
        out[f"{layer.name}.scale"] = torch.tensor(layer.scale, dtype=torch.float64)
    return out


@torch.no_grad()
def load_adapter_state(
    model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default"
) -> nn.Module:
    """Puts saved adapters on a model that has none; or, where it has them, takes their values.

    Args:
        model: of the same architecture as the saved one. PEFT's: with LoRA of the same rank.
        state: of `adapter_state`.
        adapter: PEFT's name of the adapter.

    Raises:
        ValueError: layers, shapes or scales are others. Nothing has changed.
    """
    names = sorted({key.rpartition(".")[0] for key in state})
    wanted = {f"{name}.{key}" for name in names for key in ("R", "B", "A", "scale")}
    if not names or wanted != set(state):
        raise ValueError("state is not one of adapter_state")
    present = {layer.name: layer for layer in adapters(model, adapter)}
    if present:
        if present.keys() != set(names):
            raise ValueError(f"other layers have adapters: {sorted(present.keys() ^ set(names))}")
        for name, layer in present.items():
            mine = layer.latent.R.shape, layer.latent.B.shape, layer.a.shape
            if mine != tuple(state[f"{name}.{key}"].shape for key in "RBA"):
                raise ValueError(f"{name}: shapes differ")
            if layer.scale != float(state[f"{name}.scale"]):
                raise ValueError(f"{name}: its scale is another one")
        for name, layer in present.items():
            layer.latent.R.copy_(state[f"{name}.R"])
            layer.latent.B.copy_(state[f"{name}.B"])
            layer.a.copy_(state[f"{name}.A"])
        return model
    rank = len(state[f"{names[0]}.R"])
    found = _layers(model, names, rank, adapter)
    for name in names:
        shape = found[name].weight.T.shape if found[name].transposed else found[name].weight.shape
        if shape != (len(state[f"{name}.B"]), state[f"{name}.A"].shape[1]):
            raise ValueError(f"{name}: shapes differ")
    for name in names:
        a, b, r = (state[f"{name}.{key}"].clone() for key in "ABR")
        found[name].attach(model, a, b, r, float(state[f"{name}.scale"]))
    return _freeze(model, [], adapter)


def average_adapters(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The state whose R are the means of several: exactly the mean of the models, to rounding.

    B and A must be the same in all: then mean(B R_i A) = B mean(R_i) A, and r * r numbers per layer
    are all that clients send. (Of LoRA's A and B the mean of the products is not the product of the
    means.) `pysmooth.federated.ModelClient` sends trained parameters only, so that `FedAvg` over
    such models does the same.

    Args:
        states: of `adapter_state`.
        weights: of the mean, at least 0; None: all alike.

    Raises:
        ValueError: there is no state, B or A differ, or weights do not fit.

    Source: arXiv:2502.15436.
    """
    if not states:
        raise ValueError("states must hold at least one state")
    w = torch.tensor([1.0] * len(states) if weights is None else list(weights)).double()
    if len(w) != len(states) or bool((w < 0).any()) or float(w.sum()) == 0:
        raise ValueError(f"weights must be {len(states)} numbers of at least 0; got {weights}")
    out = {}
    for key, first in states[0].items():
        if any(s.keys() != states[0].keys() or s[key].shape != first.shape for s in states):
            raise ValueError(f"{key}: states are of different adapters")
        if not key.endswith(".R"):
            if not all(torch.equal(s[key], first) for s in states):
                raise ValueError(f"{key} differs: only R can be averaged exactly")
            out[key] = first.clone()
            continue
        stacked = torch.stack([s[key].double() for s in states])
        factors = (w / w.sum()).view(-1, 1, 1).to(stacked.device)
        out[key] = tree_sum(stacked * factors).to(first.dtype)
    return out


class _Layer:
    """A layer that an adapter can be put on: a plain one, or one with PEFT's LoRA."""

    def __init__(self, name: str, module: nn.Module, adapter: str) -> None:
        self.name, self.module, self.adapter = name, module, adapter
        self.of_peft = not isinstance(module, nn.Linear)
        base: Any = module.base_layer if self.of_peft else module
        self.weight: nn.Parameter = base.weight
        self.transposed = bool(getattr(module, "fan_in_fan_out", False))

    def scale(self, own: float) -> float:
        """PEFT's, where it has one."""
        scaling: Any = getattr(self.module, "scaling", {})
        return float(scaling[self.adapter]) if self.of_peft else own

    def attach(self, model: nn.Module, a: Tensor, b: Tensor, r: Tensor, scale: float) -> None:
        """Puts the adapter on; all in the weight's dtype."""
        w = self.weight
        a, b = (x.to(w.device, w.dtype).contiguous() for x in (a, b))
        r = r.to(w.device, w.dtype).contiguous()
        if self.of_peft:
            peft: Any = self.module
            peft.lora_A[self.adapter].weight.copy_(a)
            peft.lora_B[self.adapter] = Latent(b, r)
        else:
            assert isinstance(self.module, nn.Linear)
            _replace(model, self.name, LatentLinear(self.module, a, b, r, scale))


def _layers(
    model: nn.Module, targets: Sequence[str] | None, rank: int, adapter: str
) -> dict[str, _Layer]:
    if any(True for _ in adapters(model, adapter)):
        raise ValueError("the model has adapters already: see unload")
    peft: dict[str, nn.Module] = {}
    plain: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        lora_a: Any = getattr(module, "lora_A", {})
        if adapter in lora_a and hasattr(module, "base_layer"):
            peft[name] = module
        elif isinstance(module, nn.Linear):
            plain[name] = module
    chosen = {
        name: _Layer(name, module, adapter)
        for name, module in (peft or plain).items()
        if targets is None or any(name == t or name.endswith("." + t) for t in targets)
    }
    if not chosen:
        raise ValueError(f"no linear layer is called {targets}")
    for name, layer in chosen.items():
        if not 0 < rank <= min(layer.weight.shape):
            raise ValueError(f"rank must be from 1 to {min(layer.weight.shape)} for {name}")
        if layer.of_peft:
            module = layer.module
            a: Any = module.lora_A
            b: Any = module.lora_B
            if len(a[adapter].weight) != rank:
                raise ValueError(f"{name} has LoRA of rank {len(a[adapter].weight)}, not {rank}")
            if bool(b[adapter].weight.any()):
                raise ValueError(f"{name}: its LoRA has been trained, B is not 0")
    return chosen


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    home, _, last = name.rpartition(".")
    setattr(model.get_submodule(home), last, new)


def _freeze(model: nn.Module, kept: Sequence[str], adapter: str) -> nn.Module:
    trained = {id(layer.latent.R) for layer in adapters(model, adapter)}
    for name, p in model.named_parameters():
        p.requires_grad_(id(p) in trained or name in kept)
    return model
