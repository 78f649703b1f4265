"""What all tests share: one seed, the thread count put back, no GPU test without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import hypothesis
import interpreter
import pytest
import torch
from battery import CUDA_EMULATED, CUDA_LACKS, DEVICE_BACKENDS, INTERPRETED, TRITON_LACKS
from registry import Entry

from pysmooth import BackendError
from pysmooth.engine.backends import triton_interpreted

if triton_interpreted():
    interpreter.tame()
if CUDA_EMULATED:
    from simt import emulated

    sys.modules["pysmooth._cuda"] = emulated.module()

# Derandomised: a red build says something about the change, not about luck.
hypothesis.settings.register_profile("pysmooth", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("pysmooth")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["interpreter", "device"])
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Triton's kernels: one a chunk, as the interpreter likes it, or those that a GPU gets."""
    from pysmooth.triton_kernels import tuning

    if request.param == "device":
        monkeypatch.setattr(tuning, "WHOLE_CHUNKS", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if DEVICE_BACKENDS:
        items[:] = [item for item in items if _is_for_host_run(item)]


def _is_for_host_run(item: pytest.Item) -> bool:
    """Whether a device's kernels run it on the host: tests of its backend, less repetition."""
    own = {"interpreted": triton_interpreted(), "emulated": CUDA_EMULATED}
    if marked := [name for name in own if item.get_closest_marker(name) is not None]:
        return any(own[name] for name in marked)
    given = getattr(item, "callspec", None)
    if given is None or given.params.get("backend") not in DEVICE_BACKENDS:
        return False
    if CUDA_EMULATED:
        return item.get_closest_marker("many_steps") is None
    if item.get_closest_marker("many_steps") is not None:
        return False
    # One test takes everything; the others, which are about what all rules go through alike, the
    # richest variant of a few.
    entry, kwargs = given.params.get("entry"), given.params.get("kwargs")
    if item.name.startswith("test_agrees_with_float64_reference") or not isinstance(entry, Entry):
        return True
    return entry.name in INTERPRETED and kwargs in (None, entry.main)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """What a device's backend is known to lack skips a test that asks for it."""
    try:
        return (yield)
    except BackendError as error:
        known = [f"triton backend has no kernel for {what}" for what in TRITON_LACKS]
        known += [f"cuda backend has no kernel for {what}" for what in CUDA_LACKS]
        if not any(what in str(error) for what in known):
            raise
        pytest.skip(str(error))
