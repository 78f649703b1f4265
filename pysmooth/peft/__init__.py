"""LoRA-SB: adapters of a few numbers, begun with the first step of full fine-tuning."""

from .adapters import (
    adapter_state,
    adapters,
    average_adapters,
    load_adapter_state,
    lora_sb,
    lora_xs,
    optimal_projection,
    unload,
)
from .gradients import collect_gradients
from .latent import Adapted, Latent, LatentLinear

__all__ = [
    "Adapted",
    "Latent",
    "LatentLinear",
    "adapter_state",
    "adapters",
    "average_adapters",
    "collect_gradients",
    "load_adapter_state",
    "lora_sb",
    "lora_xs",
    "optimal_projection",
    "unload",
]
