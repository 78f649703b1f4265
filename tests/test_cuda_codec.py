"""codec on the CUDA backend, emulated: who takes it (and test_cuda_kernels_codec.py: how)."""

from __future__ import annotations

import pytest
import torch
from battery import CUDA_EMULATED
from cuda_late import NoReads
from messages import SENT, coded, same_bits
from simt import emulated

from pysmooth.compressors import Compressor
from pysmooth.distributed import codec, cuda_codec

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not CUDA_EMULATED, reason="PYSMOOTH_EMULATED=1 is not set"),
]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.take_cpu_tensors(monkeypatch)


@pytest.mark.usefixtures("on_cuda")
def test_devices_take_it() -> None:
    assert codec._modules(torch.ones(3)) == [cuda_codec]
    bits = torch.zeros(1, dtype=torch.uint8)
    before = emulated.calls()
    total = codec.code_signs(torch.tensor([1.0, -1.0, 0.0]), None, 1.0, 1.0, None, bits)
    assert emulated.calls() == before._replace(launches=before.launches + 2)
    assert (bits.tolist(), float(total)) == ([5], 2.0)


def test_the_cpu_takes_its_own() -> None:
    before = emulated.calls()
    coded(SENT[0], 20)
    assert emulated.calls() == before


@pytest.mark.parametrize("compressor", SENT, ids=repr)
def test_messages(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = coded(compressor, 1000)
    emulated.take_cpu_tensors(monkeypatch)
    before = emulated.calls().launches
    for ours, theirs in zip(coded(compressor, 1000), expected, strict=True):
        assert same_bits(ours, theirs)
    assert emulated.calls().launches > before


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("k", [10, 900])
def test_the_largest_are_found_without_waiting(k: int) -> None:
    """Launches are as many whatever the numbers, and nothing is read on the host."""
    message = torch.zeros(8000, dtype=torch.uint8)
    counts = []
    for g in (torch.randn(1000), torch.zeros(1000), torch.ones(1000)):
        before = emulated.calls().launches
        with NoReads():
            cuda_codec.code_top_k(g, None, 1.0, 1.0, k, None, message)
        counts.append(emulated.calls().launches - before)
    assert counts == [6 if k == 10 else 5] * 3
