"""100,000 steps with gradients that come and go: memory must not grow.

    python -m fuzz.soak --steps 100000     # in tests/; or `make soak`

One optimizer of each method in turn; now and then a checkpoint, a new learning rate, `p.data`
replaced. The resident size is read ten times; after the first tenth it may not grow by 4 MiB.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from pathlib import Path

import torch
from battery import make_params
from registry import REGISTRY

SHAPES = ((64, 32), (64,), (), (0, 3), (5000,))
GROWTH = 4 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> int:
    """Steps; 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    rng = random.Random(0)
    worlds = []
    for entry in REGISTRY:
        params = make_params(SHAPES)
        worlds.append((entry.build(params, "cpu"), params))
    sizes = []
    for step in range(1, steps + 1):
        optimizer, params = worlds[step % len(worlds)]
        for p in params:
            keep = rng.random()
            if keep < 0.2:
                p.grad = None
            elif keep < 0.6 or p.grad is None:
                p.grad = torch.full_like(p, rng.uniform(-0.1, 0.1))
        optimizer.step()
        what = rng.randrange(200)
        if what == 0:
            optimizer.load_state_dict(optimizer.state_dict())
        elif what == 1 and "lr" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["lr"] = rng.uniform(0.001, 0.1)
        elif what == 2:
            params[0].data = params[0].data.clone()
        if step % (steps // 10) == 0:
            gc.collect()
            sizes.append(resident())
            print(f"step {step}: {sizes[-1] / 2**20:.1f} MiB", flush=True)
    grown = max(sizes[1:]) - sizes[0]
    print(f"{steps} steps of {len(worlds)} optimizers; grown by {grown / 2**20:.2f} MiB")
    return int(grown > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
