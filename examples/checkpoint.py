"""Checkpoints of model and optimizer: distributed checkpoint (DCP), and safetensors.

    python examples/checkpoint.py                 # the second part needs `pip install safetensors`

`torch.save(optimizer.state_dict())` needs no example. DCP asks for states by the names of
parameters, and makes the states of a fresh optimizer by a step of zero gradients at lr=0, which
pysmooth takes as torch does.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import pysmooth


def save_dcp(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saves both; with several processes, each its part."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load_dcp(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads both in place: a fresh optimizer of the same arguments goes on where the other was."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def save_tensors(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """States as safetensors "index.key"; what is no tensor (groups, counts) as JSON beside them."""
    from safetensors.torch import save_file

    saved = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                # States share one allocation, which safetensors does not take: each is copied.
                tensors[f"{index}.{key}"] = value.clone(memory_format=torch.contiguous_format)
            else:
                rest[f"{index}.{key}"] = value
    save_file(tensors, path)
    groups = [
        {key: str(v) if isinstance(v, torch.dtype) else v for key, v in group.items()}
        for group in saved["param_groups"]
    ]
    path.with_suffix(".json").write_text(json.dumps({"groups": groups, "rest": rest}))


def load_tensors(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Into an optimizer of the same arguments; what its groups hold is that of the file."""
    from safetensors.torch import load_file

    told = json.loads(path.with_suffix(".json").read_text())
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**load_file(path), **told["rest"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    for group, old in zip(saved["param_groups"], told["groups"], strict=True):
        for key, value in old.items():
            if key != "params" and not isinstance(group[key], torch.dtype):
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def main() -> None:
    """Trains, saves, and goes on from what was saved."""

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 1)
        return model, pysmooth.AdamW(model.parameters(), 0.01, max_norm=1.0)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()

    model, optimizer = fresh()
    train(model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        save_dcp(folder, model, optimizer)
        other, resumed = fresh()
        load_dcp(folder, other, resumed)
        save_tensors(Path(folder) / "optimizer.safetensors", optimizer)
        third, again = fresh()
        third.load_state_dict(model.state_dict())
        load_tensors(Path(folder) / "optimizer.safetensors", again)
    train(model, optimizer)
    train(other, resumed)
    train(third, again)
    for p, q, r in zip(model.parameters(), other.parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


if __name__ == "__main__":
    main()
