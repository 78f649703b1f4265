"""The loop of torchtitan, in small: a parallelised model, accumulation, a schedule, checkpoints.

torchrun --nproc-per-node 2 examples/titan_loop.py

Where torchtitan calls `clip_grad_norm_` between backward and step, the clip is in the step: by the
norm of the whole model, with one all-reduce of its own.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

import pysmooth

VOCABULARY, LENGTH, WIDTH = 40, 16, 16
BATCH, ACCUMULATED, STEPS, WARMUP = 8, 2, 8, 2


class Block(nn.Module):
    """Attention and a small network, computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.read = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.write = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self.norm(x)).chunk(3, dim=-1)
        return x + self.write(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    def forward(self, x: Tensor) -> Tensor:
        """Of (batch, length, width), the same."""
        out: Tensor = checkpoint(self._attend, x, use_reentrant=False)
        return out


class Decoder(nn.Module):
    """The same numbers in every process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of guessing each token from those before it."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


def parallelize(net: Decoder) -> Decoder:
    """FSDP2: each block by itself, then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def batch(step: int, part: int) -> Tensor:
    """Of all processes: numbers that count up, from somewhere."""
    at = torch.Generator().manual_seed(step * ACCUMULATED + part)
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=at)
    return (first + torch.arange(LENGTH + 1)) % VOCABULARY


class Training(Stateful):
    """All that goes on, and that a checkpoint holds."""

    def __init__(self, net: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.net, self.optimizer, self.step = net, make(net.parameters()), 0
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda k: min((k + 1) / WARMUP, (STEPS - k) / (STEPS - WARMUP))
        )

    def state_dict(self) -> dict[str, Any]:
        """Shards of parameters and states by the parameters' names, and the rest."""
        net, optimizer = get_state_dict(self.net, self.optimizer)
        schedule = self.schedule.state_dict()
        return {"net": net, "optimizer": optimizer, "schedule": schedule, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What DCP read into the shards that it was shown."""
        net, optimizer = state_dict["net"], state_dict["optimizer"]
        set_state_dict(self.net, self.optimizer, model_state_dict=net, optim_state_dict=optimizer)
        self.schedule.load_state_dict(state_dict["schedule"])
        self.step = state_dict["step"]

    def run(self, until: int, *, max_norm: float | None = None) -> float:
        """Trains, and returns the last loss. `max_norm`: of a clip before the step."""
        loss = torch.zeros(())
        shard = slice(None)
        if isinstance(self.net, FSDPModule):
            shard = slice(dist.get_rank(), None, dist.get_world_size())
        while self.step < until:
            self.optimizer.zero_grad()
            for part in range(ACCUMULATED):
                if isinstance(self.net, FSDPModule):  # gradients are summed once, in the end
                    self.net.set_requires_gradient_sync(part == ACCUMULATED - 1)
                loss = self.net(batch(self.step, part)[shard])
                (loss / ACCUMULATED).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(self.net.parameters(), max_norm)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
        return float(loss.detach())


def shared_folder() -> str:
    """One for all processes of this machine."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    return name[0]


def main() -> None:
    """Trains sharded, goes on from the middle, and compares with a whole model under torch."""
    dist.init_process_group("gloo")

    def fused(params: Any) -> torch.optim.Optimizer:
        return pysmooth.AdamW(params, 0.02, weight_decay=0.1, max_norm=0.5)

    def torchs(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, 0.02, weight_decay=0.1)

    training, resumed = (Training(parallelize(Decoder()), fused) for _ in range(2))
    training.run(STEPS // 2)
    folder = shared_folder()
    dcp.save({"training": training}, checkpoint_id=folder)
    training.run(STEPS)
    dcp.load({"training": resumed}, checkpoint_id=folder)
    resumed.run(STEPS)
    whole = Training(Decoder(), torchs)
    loss = whole.run(STEPS, max_norm=0.5)

    mine, again, theirs = (list(t.net.parameters()) for t in (training, resumed, whole))
    for p, q, r in zip(mine, again, theirs, strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        torch.testing.assert_close(p.full_tensor(), r, rtol=1e-4, atol=1e-5)
    if dist.get_rank() == 0:
        norm = training.optimizer.last_norm()
        print(f"sharded as whole, resumed to the bit: loss {loss:.3f}, last norm {norm:.3f}")
    del training, resumed, mine, again, p, q  # before their process group
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
