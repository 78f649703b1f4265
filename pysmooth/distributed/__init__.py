"""Data-parallel training that sends less: hooks for DistributedDataParallel, and what they cost."""

from .cost import Answer, will_it_help
from .network import Network

__all__ = ["Answer", "Network", "will_it_help"]
