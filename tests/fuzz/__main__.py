"""Random lives of optimizers on the native backend and on the eager one: they must be alike.

    python -m fuzz --cases 100000      # in tests/; or `make fuzz CASES=100000`
    python -m fuzz --seed 1234         # one case, told action by action

After each action either both backends refused, and nothing changed, or both took it, and all
parameters and states agree to the bound of docs/robustness.md.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback

import torch

from .case import FindingError, run


def main() -> int:
    """Runs cases until one fails ten times over; 1 if any did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--seed", type=int, default=None, help="one case, in words")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--findings", type=int, default=10, help="stop after so many")
    args = parser.parse_args()
    if args.seed is not None:
        run(args.seed, say=print)
        return 0
    counts: collections.Counter[str] = collections.Counter()
    found = done = 0
    begin = time.monotonic()
    for seed in range(args.first, args.first + args.cases):
        if time.monotonic() - begin > args.seconds or found >= args.findings:
            break
        try:
            counts.update(run(seed))
        except FindingError as finding:
            found += 1
            print(f"seed {seed}: {finding}", flush=True)
        except Exception:
            found += 1
            print(f"seed {seed}:", flush=True)
            traceback.print_exc(limit=-6, file=sys.stdout)
        done += 1
        if done % 5000 == 0:
            print(f"{done} cases, {found} findings", flush=True)
    torch.set_num_threads(1)
    actions = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
    print(f"{done} cases from seed {args.first}, {found} findings; {actions}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
