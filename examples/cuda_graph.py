"""A training step in one CUDA graph: forward, backward, clip and optimizer, replayed as one launch.

    python examples/cuda_graph.py        # needs a GPU, and pysmooth's CUDA or Triton backend

What a capture needs: batches that are copied into one place; gradients that stay where they are
(`set_to_none=False`); a learning rate on the device, so that a schedule reaches what was captured;
`capturable=True`; and some steps before it, on a stream of their own, which allocate states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pysmooth


def network() -> nn.Sequential:
    """The same numbers each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()


def optimizer_of(net: nn.Module) -> pysmooth.AdamW:
    """With the clip inside, and a learning rate that a graph reads at every replay."""
    return pysmooth.AdamW(
        net.parameters(), torch.tensor(0.01, device="cuda"), max_norm=0.5, capturable=True
    )


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """The sum of the columns, as the net knows it."""
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """One step of training; nothing in it waits for the device."""
    optimizer.zero_grad(set_to_none=False)
    loss = loss_of(net, x)
    loss.backward()
    optimizer.step()
    return loss


def train(batches: Tensor, *, graph: bool, warmup: int = 3) -> tuple[nn.Module, list[float]]:
    """A step for each batch; with a graph, all but the first few are replays."""
    net = network()
    optimizer = optimizer_of(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    losses = []
    x = batches[0].clone()  # where the graph looks for its batch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for batch in batches[:warmup]:
            x.copy_(batch)
            losses.append(step(net, optimizer, x).detach().clone())
            schedule.step()
    torch.cuda.current_stream().wait_stream(aside)

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):  # notes what happens, and does nothing yet
            loss = step(net, optimizer, x)
    for batch in batches[warmup:]:
        x.copy_(batch)
        if graph:
            captured.replay()
        else:
            loss = step(net, optimizer, x)
        losses.append(loss.detach().clone())
        schedule.step()  # writes into the tensor that the graph reads
    return net, [float(loss) for loss in losses]


def main() -> list[float]:
    """Trains in a graph, and without one: the same losses."""
    batches = torch.randn(40, 16, 8, generator=torch.Generator().manual_seed(1)).cuda()
    net, losses = train(batches, graph=True)
    other, expected = train(batches, graph=False)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(losses, expected)
    return losses


if __name__ == "__main__":
    print(main())
