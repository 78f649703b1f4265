"""Data-parallel training that sends less: hooks for DDP and FSDP2, and what they cost."""

from .clip21 import Clip21SGD2M
from .cost import Answer, will_it_help
from .feedback import DCSGD, EF14, EF21
from .handshake import MismatchError
from .hook import CompressedState, compressed_hook
from .method import Method
from .network import Network
from .replicas import AllReduceState, compress_all_reduce
from .scaler import GradScaler
from .sharded import set_sharding
from .shards import ReduceScatterState, compress_reduce_scatter
from .signs import DSignSGD, MajorityVote, TwoWaySign

__all__ = [
    "DCSGD",
    "EF14",
    "EF21",
    "AllReduceState",
    "Answer",
    "Clip21SGD2M",
    "CompressedState",
    "DSignSGD",
    "GradScaler",
    "MajorityVote",
    "Method",
    "MismatchError",
    "Network",
    "ReduceScatterState",
    "TwoWaySign",
    "compress_all_reduce",
    "compress_reduce_scatter",
    "compressed_hook",
    "set_sharding",
    "will_it_help",
]
