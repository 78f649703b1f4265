"""Examples for other people's trainers, against the same training with torch's optimizers.

The packages are in the dependency group `integrations`, which `make test` installs: a test without
its package fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pysmooth

EXAMPLES = Path(__file__).parents[1] / "examples"

# What these packages say of themselves and of torch.
pytestmark = [pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_alike(mine: nn.Module, theirs: nn.Module) -> None:
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---- Hugging Face -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_by_torch() -> nn.Module:
    sys.path.insert(0, str(EXAMPLES))
    import hf_trainer

    sys.path.remove(str(EXAMPLES))
    model: nn.Module = hf_trainer.train(max_grad_norm=0.5, optim="adamw_torch")[0]
    return model


def test_hf_trainer(trained_by_torch: nn.Module) -> None:
    import hf_trainer

    choice = (pysmooth.AdamW, {"lr": 1e-2, "max_norm": 0.5})
    model, trainer = hf_trainer.train(max_grad_norm=0.0, optimizer_cls_and_kwargs=choice)
    assert type(trainer.optimizer.optimizer) is pysmooth.AdamW
    assert_alike(model, trained_by_torch)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_hf_trainer_by_name(trained_by_torch: nn.Module) -> None:
    import hf_trainer

    swap = hf_trainer.Swap(max_norm=0.5)
    model, trainer = hf_trainer.train(max_grad_norm=0.0, optim="adamw_torch", callbacks=[swap])
    assert type(trainer.optimizer.optimizer) is pysmooth.AdamW
    assert trainer.optimizer.optimizer.last_norm() is not None
    assert trainer.optimizer.optimizer.param_groups[0]["lr"] == 0  # the end of the schedule
    assert_alike(model, trained_by_torch)


def test_accelerate() -> None:
    import accelerate_loop

    for p, q in zip(accelerate_loop.train("fused"), accelerate_loop.train("torch"), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_peft() -> None:
    import peft_lora

    start = peft_lora.train(lambda p: pysmooth.AdamW(p, 1e-2), steps=0)
    mine = peft_lora.train(lambda p: pysmooth.AdamW(p, 1e-2))
    theirs = peft_lora.train(lambda p: torch.optim.AdamW(p, 1e-2))
    assert_alike(mine, theirs)
    for (name, p), q in zip(mine.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) == ("lora_" not in name), name


# ---- Lightning ----------------------------------------------------------------------------------


def mixed(precision: str) -> dict[str, Any]:
    """Trainer arguments. Lightning itself gives CPUs bfloat16, but the plugin can scale there."""
    if precision == "bf16-mixed":
        return {"precision": precision}
    from pytorch_lightning.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning(precision: str) -> None:
    import lightning_module

    def torchs(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, 0.01)

    def inside(params: Any) -> torch.optim.Optimizer:
        return pysmooth.AdamW(params, 0.01, max_norm=0.1)

    def outside(params: Any) -> torch.optim.Optimizer:
        return pysmooth.AdamW(params, 0.01, amp="external")

    theirs = lightning_module.train(torchs, gradient_clip_val=0.1, **mixed(precision))
    assert_alike(lightning_module.train(inside, **mixed(precision)), theirs)
    assert_alike(lightning_module.train(outside, gradient_clip_val=0.1, **mixed(precision)), theirs)
    with pytest.raises(RuntimeError, match="AdamW, does not allow for gradient clipping"):
        lightning_module.train(inside, gradient_clip_val=0.1, **mixed(precision))


def test_lora_sb() -> None:
    """That few steps say nothing of losses, but all methods learn, and what they train is known."""
    import lora_sb

    rows = lora_sb.compare(steps=25, before=60)
    layers, head = 2 * 6, 64 * 10 + 10
    assert rows["LoRA-SB"]["trained"] == rows["LoRA-XS"]["trained"] == layers * 8**2 + head
    assert rows["LoRA"]["trained"] == 2 * 8 * (4 * 2 * 64 + 2 * (64 + 256)) + head
    for name, row in rows.items():
        over = row["bytes"] - 12 * row["trained"]  # than a gradient and two averages: step counts
        assert 0 <= over <= 4 * 40, name
        assert row["loss"] < 2.2, name  # guessing: 2.3
    assert rows["LoRA-SB"]["loss"] < rows["LoRA-XS"]["loss"]
