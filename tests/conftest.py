"""What all tests share: one seed, the thread count put back, no GPU test without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Derandomised: a red build says something about the change, not about luck.
hypothesis.settings.register_profile("pysmooth", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("pysmooth")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
