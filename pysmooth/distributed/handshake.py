"""Whether all ranks mean the same: asked before the first gradients are sent."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class MismatchError(RuntimeError):
    """Ranks disagree about what is sent."""


def shake_hands(about: dict[str, str], group: Any) -> None:
    """Compares a description, key by key, with that of the group's first rank.

    Raises:
        MismatchError: on every rank, naming the first difference.
    """
    everybody: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everybody, about, group=group)
    first = everybody[0]
    for rank, theirs in enumerate(everybody):
        # In the same order, or the bytes mean something else.
        if theirs.keys() == first.keys() and list(theirs) != list(first):
            raise MismatchError(f"rank {rank} has its parameters in another order than rank 0")
        for key in [*first, *theirs]:
            if theirs.get(key) != first.get(key):
                raise MismatchError(
                    f"ranks disagree: {key} is {first.get(key, 'missing')} on rank 0 and "
                    f"{theirs.get(key, 'missing')} on rank {rank}"
                )
