"""Hugging Face Trainer: pysmooth as the optimizer, or swapped in for the one chosen by name.

pip install 'pysmooth[bench]' accelerate      # transformers and what its Trainer needs
python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import pysmooth


class Swap(TrainerCallback):
    """Gives the optimizer that `TrainingArguments(optim=...)` names its fused twin.

    Its learning rate schedule follows, and so does what was loaded from a checkpoint.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer hands out Accelerate's wrapper: what it wraps is exchanged."""
        wrapper = kwargs["optimizer"]
        wrapper.optimizer = pysmooth.swap(wrapper.optimizer, **self.options)


def train(steps: int = 8, **kwargs: Any) -> tuple[GPT2LMHeadModel, Trainer]:
    """Trains a very small GPT-2 to count. `kwargs` are Trainer's, and its arguments'."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    data = [
        {"input_ids": x, "labels": x} for x in (torch.arange(64)[:, None] + torch.arange(16)) % 40
    ]
    own = {
        key: kwargs.pop(key) for key in ("callbacks", "optimizer_cls_and_kwargs") & kwargs.keys()
    }
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            weight_decay=0.1,
            warmup_steps=2,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **kwargs,
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, **own)
        trainer.train()
    return model, trainer


if __name__ == "__main__":
    # The clip is in the step: Trainer's own is switched off.
    choice = (pysmooth.AdamW, {"lr": 1e-2, "max_norm": 1.0})
    train(max_grad_norm=0.0, optimizer_cls_and_kwargs=choice)
    # Or by name, through the callback.
    train(max_grad_norm=0.0, optim="adamw_torch", callbacks=[Swap(max_norm=1.0)])
