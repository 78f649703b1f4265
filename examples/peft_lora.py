"""PEFT: LoRA adapters under one fused step, saved as safetensors.

pip install 'pysmooth[bench]' peft
python examples/peft_lora.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import pysmooth


def train(make: Callable[[Any], torch.optim.Optimizer], steps: int = 6) -> PeftModel:
    """Trains the adapters of a very small GPT-2. Frozen parameters are left alone."""
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
    base = GPT2LMHeadModel(config)
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    optimizer = make(model.named_parameters())
    tokens = torch.randint(0, 40, (8, 16))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    train(lambda p: pysmooth.AdamW(p, 1e-2, max_norm=1.0))
