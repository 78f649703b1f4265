"""The cost model of compressed communication: identities, bounds, and a small simulation."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysmooth.distributed import Network, will_it_help
from pysmooth.distributed.cost import Workload, predict
from pysmooth.distributed.schemes import METHODS, scheme, sparse_bytes

GIGABIT = 125e6


def test_collectives_of_large_messages_take_their_bytes() -> None:
    net = Network(GIGABIT, latency=0.0)
    for ranks in (2, 3, 8, 100):
        assert net.all_reduce(1e9, ranks) == pytest.approx(2 * (ranks - 1) / ranks * 8)
        assert net.all_gather(1e9, ranks) == pytest.approx((ranks - 1) * 8)
        assert net.all_to_all(1e9, ranks) == pytest.approx((ranks - 1) / ranks * 8)
    # Reduce-scatter and all-gather are the two halves of a ring.
    assert net.all_to_all(1e6, 7) + net.all_gather(1e6 / 7, 7) == pytest.approx(
        net.all_reduce(1e6, 7)
    )


def test_small_messages_of_many_ranks_take_a_tree() -> None:
    net = Network(GIGABIT, latency=1e-3)
    assert net.all_reduce(8, 1024) == pytest.approx(20e-3, rel=1e-3)
    assert net.all_gather(1, 1024) == pytest.approx(10e-3, rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_sends_nothing(method: str) -> None:
    step = predict(Workload(10_000_000, 0.1), Network(1.0), 1, scheme(method))
    assert step.network == 0
    assert step.sent == 0
    assert step.total == pytest.approx(0.1 + step.packing)


@given(
    st.integers(1, 200_000_000),
    st.integers(2, 20_000),
    st.floats(0, 2),
    st.sampled_from(METHODS),
    st.floats(0, 1),
)
def test_a_step_lies_between_its_bounds(
    numel: int, ranks: int, backward: float, method: str, overlap: float
) -> None:
    net, way = Network(GIGABIT), scheme(method)
    step = predict(Workload(numel, backward, 0.01, overlap=overlap), net, ranks, way)
    none = predict(Workload(numel, backward, 0.01, overlap=0), net, ranks, way)
    computed = backward + step.packing
    assert step.total * (1 + 1e-9) >= 0.01 + max(computed, step.network)
    assert step.total <= none.total * (1 + 1e-9)
    assert none.total == pytest.approx(0.01 + computed + step.network, rel=1e-6)
    assert step.exposed == pytest.approx(step.total - 0.01 - computed, abs=1e-9 * none.total)


def _simulated(buckets: list[float], travel: float, backward: float) -> float:
    """When the last bucket is there: events in order, no packing."""
    ready = [backward * (i + 1) / len(buckets) for i in range(len(buckets))]
    done = 0.0
    for at in ready:
        done = max(done, at) + travel
    return done


@pytest.mark.parametrize("backward", [0.0, 0.1, 0.6, 5.0])
def test_dense_buckets_queue(backward: float) -> None:
    work = Workload(10 * 25 * 2**18, backward)
    step = predict(work, Network(GIGABIT, 0.0), 2, scheme("dense"))
    expected = _simulated([1.0] * 10, 25 * 2**20 / GIGABIT, backward)
    assert step.total == pytest.approx(expected)


def test_bytes_of_sparse_messages() -> None:
    assert sparse_bytes(1024, 10) == math.ceil(10 * 10 / 8) + 40  # indices
    assert sparse_bytes(1024, 512) == 128 + 2048  # a bitmap
    assert sparse_bytes(1, 1) == 4  # nowhere else to be


def test_when_it_helps() -> None:
    slow = will_it_help(124_000_000, 8, bandwidth=GIGABIT, backward=0.3)
    assert slow.helps
    assert slow.speedup > 3
    fast = will_it_help(1_000_000, 8, bandwidth=400 * GIGABIT, backward=0.3)
    assert not fast.helps
    assert "does not help" in str(fast)
    # Gathered messages grow with the ranks, a sum does not.
    many = will_it_help(124_000_000, 1024, bandwidth=GIGABIT, backward=0.3, method="topk")
    assert not many.helps
    assert "so many ranks" in str(many)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("numel", 0),
        ("ranks", 0),
        ("bandwidth", 0.0),
        ("bandwidth", float("nan")),
        ("latency", -1.0),
        ("backward", -1.0),
        ("other", float("nan")),
        ("overlap", 1.5),
        ("memory_bandwidth", 0.0),
        ("method", "gzip"),
    ],
)
def test_bad_numbers_are_named(name: str, value: object) -> None:
    good: dict[str, object] = {"numel": 10, "ranks": 2, "bandwidth": 1e9, "backward": 0.1}
    with pytest.raises(ValueError, match=name):
        will_it_help(**{**good, name: value})  # type: ignore[arg-type]
