"""What a clip costs where its norm is taken in backward: `python -m pysmooth.bench.backward`.

The cost is T(backward + step with the clip) - T(backward + step without it): a norm that is taken
in backward makes backward slower, and counts. All contestants share one model, one after the other
in each round, and a cost is the median over rounds of the difference within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pysmooth

PLAIN, IN_STEP, IN_BACKWARD = "no clip", "clip, norm in step", "clip, norm in backward"


def gpt2(tokens: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """GPT-2 124M with drawn weights, and its loss on one sequence."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model: nn.Module = GPT2LMHeadModel(config)
    ids = torch.randint(config.vocab_size, (1, tokens))
    return model, lambda: model(ids, labels=ids).loss


class _Contestants:
    """Three optimizers on the parameters of one model; only one's hooks are there at a time."""

    def __init__(self, params: list[nn.Parameter], loss: Callable[[], Tensor]) -> None:
        self.params, self.loss = params, loss
        clip: dict[str, Any] = {"lr": 1e-9, "momentum": 0.9, "max_norm": 1e-3}
        self.optimizers = {
            PLAIN: pysmooth.ClipSGD(params, 1e-9, momentum=0.9),
            IN_STEP: pysmooth.ClipSGD(params, **clip),
            IN_BACKWARD: pysmooth.ClipSGD(params, norm="in_backward", **clip),
        }
        self.hooks = [self.optimizers[IN_BACKWARD].backward_sums(p) for p in params]

    def run(self, name: str) -> tuple[float, float]:
        """Seconds of one backward pass and of one step."""
        for p, hook in zip(self.params, self.hooks, strict=True):
            p.grad = None
            registered = p._post_accumulate_grad_hooks
            registered.clear()
            if name == IN_BACKWARD:
                p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        loss = self.loss()
        start = time.perf_counter()
        torch.autograd.backward(loss)
        middle = time.perf_counter()
        self.optimizers[name].step()
        end = time.perf_counter()
        summed = self.optimizers[name].sums_from_backward()
        assert summed == (len(self.params) if name == IN_BACKWARD else 0), summed
        return middle - start, end - middle


def measure(
    params: list[nn.Parameter], loss: Callable[[], Tensor], *, rounds: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Per contestant medians, in ms: backward, step, and what its clip costs in each and in all."""
    contestants = _Contestants(params, loss)
    names = list(contestants.optimizers)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            found = contestants.run(name)
            if turn >= warmup:
                times[name].append(found)
    out = {}
    for name in names:
        pairs = list(zip(times[name], times[PLAIN], strict=True))
        out[name] = {
            "backward_ms": 1e3 * statistics.median(b for b, _ in times[name]),
            "step_ms": 1e3 * statistics.median(s for _, s in times[name]),
            "cost_in_backward_ms": 1e3 * statistics.median(a[0] - b[0] for a, b in pairs),
            "cost_in_step_ms": 1e3 * statistics.median(a[1] - b[1] for a, b in pairs),
            "cost_ms": 1e3 * statistics.median(sum(a) - sum(b) for a, b in pairs),
        }
    return out


def describe(found: dict[str, dict[str, float]]) -> list[str]:
    """The figures in words."""
    plain = found[PLAIN]
    lines = [f"{PLAIN}: backward {plain['backward_ms']:.1f} ms, step {plain['step_ms']:.1f} ms"]
    for name in (IN_STEP, IN_BACKWARD):
        f = found[name]
        whole = f["cost_ms"] / (plain["backward_ms"] + plain["step_ms"])
        lines.append(
            f"{name}: costs {f['cost_ms']:.2f} ms ({f['cost_in_backward_ms']:.2f} in backward, "
            f"{f['cost_in_step_ms']:.2f} in the step), {f['cost_ms'] / plain['step_ms']:.1%} of a "
            f"step without clip, {whole:.1%} of backward and step"
        )
    return lines


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    model, loss = gpt2(args.tokens)
    for line in describe(measure(list(model.parameters()), loss, rounds=args.rounds)):
        print(line)


if __name__ == "__main__":
    main()
