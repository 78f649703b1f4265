"""A few of the cases of `make fuzz`, so that they cannot rot."""

from __future__ import annotations

import pytest
from fuzz.case import run


@pytest.mark.parametrize("first", range(0, 300, 50))
@pytest.mark.filterwarnings("ignore")
def test_fifty_cases(first: int) -> None:
    for seed in range(first, first + 50):
        assert run(seed) is not None
