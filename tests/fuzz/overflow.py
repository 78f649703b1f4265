"""Has the native core write behind the end of a tensor.

    python -m fuzz.overflow      # in tests/, under AddressSanitizer only: `make sanitize` does it

That a run ends without a report says something only where a report would have come.
"""

from __future__ import annotations

import torch

from pysmooth import _cpu

if __name__ == "__main__":
    numbers, short = torch.arange(1000), torch.empty(1000 * 10 // 8 - 1, dtype=torch.uint8)
    _cpu.pack_bits(numbers.data_ptr(), len(numbers), 10, short.data_ptr())
