"""`python -m mutants native`, `python -m mutants python [COUNT [MODULE...]]`."""

from __future__ import annotations

import sys

from mutants import native, python

COUNT = 12  # of each module

if __name__ == "__main__":
    if sys.argv[1] == "native":
        lived = native.survivors()
    else:
        count = int(sys.argv[2]) if len(sys.argv) > 2 else COUNT
        lived = python.survivors(count, sys.argv[3:])
    print(f"{len(lived)} survived", *lived, sep="\n  ")
