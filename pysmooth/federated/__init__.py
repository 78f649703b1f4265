"""Federated learning: what clients and a server do to vectors, round by round, whoever fails.

`Server` runs a method with clients in this process; ``pysmooth.federated.flower`` with Flower.
"""

from . import attacks
from .averaging import CELGC, CEFedAvg, FedAvg
from .clients import Client, FunctionClient, ModelClient, Task
from .clip21 import Clip21SGD2M, ClipSGD
from .local import CLERR, ClipLocalGDJ, ClippedRRCLI, nastya
from .merit import MeritFed, MeritOpt
from .method import Method, Outcome, State
from .privacy import noise_for_budget, privacy_spent
from .server import NotEnoughClientsError, Server
from .uploads import UploadError, Uploads

__all__ = [
    "CELGC",
    "CLERR",
    "CEFedAvg",
    "Client",
    "Clip21SGD2M",
    "ClipLocalGDJ",
    "ClipSGD",
    "ClippedRRCLI",
    "FedAvg",
    "FunctionClient",
    "MeritFed",
    "MeritOpt",
    "Method",
    "ModelClient",
    "NotEnoughClientsError",
    "Outcome",
    "Server",
    "State",
    "Task",
    "UploadError",
    "Uploads",
    "attacks",
    "nastya",
    "noise_for_budget",
    "privacy_spent",
]
