"""The examples that need torch alone: the same training with torch, and what resumes or replays."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import (
    advance,
    assert_same_bits,
    continues_alike,
    every_entry,
    make_params,
    record_grads,
)
from registry import Entry
from torch import Tensor, nn

import pysmooth

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import checkpoint
import cuda_graph
import swap
import torch_loop

# What torch says of one process, of its own compiler, and of what the compiler looks at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def inside(params: Any) -> torch.optim.Optimizer:
    return pysmooth.AdamW(params, 0.01, max_norm=0.1)


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)


@pytest.mark.parametrize(
    ("compiler", "dtype"),
    [
        *itertools.product([None, "aot_eager"], [None, torch.bfloat16, torch.float16]),
        ("inductor", None),  # once is enough: it takes seconds
    ],
)
def test_torch_loop(compiler: str | None, dtype: torch.dtype | None) -> None:
    """Compiled backward, recomputed activations, accumulation, EMA, autocast and a scaler."""
    torch._dynamo.reset()
    mine = torch_loop.train(inside, compiler=compiler, dtype=dtype)
    theirs = torch_loop.train(torchs, compiler=compiler, dtype=dtype, max_norm=0.1)
    for a, b in zip(mine, theirs, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_compiled_training_step_breaks_at_the_optimizers() -> None:
    torch._dynamo.reset()
    models = [torch_loop.Net(), torch_loop.Net()]
    models[1].load_state_dict(models[0].state_dict())
    for model, compiled in zip(models, (True, False), strict=True):
        optimizer = inside(model.parameters())

        def step(
            x: Tensor, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for x in torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(1)):
            run(x)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_swap() -> None:
    losses = swap.main()
    assert losses[-1] < losses[0] / 3


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """Replays of a whole training step, against the same steps without a graph."""
    losses = cuda_graph.main()
    assert losses[-1] < losses[0] / 2


def test_checkpoint() -> None:
    checkpoint.main()


class Bag(nn.Module):
    """A model that is its parameters."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


@every_entry
@pytest.mark.parametrize("how", ["dcp", "safetensors"])
def test_a_fresh_optimizer_goes_on_from_a_checkpoint(
    entry: Entry, how: str, tmp_path: Path
) -> None:
    """Of every method: to the bit."""
    params = make_params()
    rows = record_grads(params, 6)
    optimizer = entry.build(params, "cpu")
    advance(optimizer, params, rows[:3])
    fresh = make_params(seed=7)
    other = entry.build(fresh, "cpu")
    if how == "dcp":
        optimizer.zero_grad()
        checkpoint.save_dcp(str(tmp_path), Bag(params), optimizer)
        checkpoint.load_dcp(str(tmp_path), Bag(fresh), other)
    else:
        checkpoint.save_tensors(tmp_path / "states.safetensors", optimizer)
        checkpoint.load_tensors(tmp_path / "states.safetensors", other)
        with torch.no_grad():
            for p, q in zip(fresh, params, strict=True):
                p.copy_(q)
    assert_same_bits(fresh, params)
    continues_alike(optimizer, other, rows[3:])
