"""The emulation that proves CUDA kernels: it must find bugs, and find none in good code."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from simt.build import HERE, library

N = 200
ORDERS = (0, 1, 2)  # forward, backward, shuffled
NAMES = [
    *("tree", "tree/unfilled", "tree/no_first_barrier", "tree/no_inner_barrier"),
    *("tree/no_last_barrier", "tree/divergent_barrier", "tree/different_barriers"),
    *("tree/out_of_room", "warp", "warp/lane_left_out", "warp/early_exit", "warp/beyond"),
    *("last", "last/no_fence_before", "last/no_fence_after", "last/no_barrier"),
    *("last/plain_ticket", "last/everybody", "grid", "grid/no_barrier"),
    *("grid/no_second_barrier", "grid/a_block_leaves", "grid/a_thread_leaves"),
    *("grid/different_barriers", "grid/not_cooperative"),
    *("odd", "odd/plain_addition", "edge/read_behind", "edge/read_before"),
    *("edge/write_behind", "edge/write_before"),
]
# What shows in wrong sums, deadlocks and bad accesses alone, races not being looked for.
PLAIN = {
    *("tree/unfilled", "tree/no_first_barrier", "tree/no_inner_barrier", "tree/no_last_barrier"),
    *("tree/divergent_barrier", "tree/different_barriers", "tree/out_of_room"),
    *("warp/lane_left_out", "warp/early_exit", "warp/beyond", "grid/no_barrier"),
    *("grid/no_second_barrier", "grid/a_block_leaves", "grid/a_thread_leaves"),
    *("grid/different_barriers", "grid/not_cooperative"),
    *("edge/read_behind", "edge/read_before", "edge/write_behind", "edge/write_before"),
}


@pytest.fixture(scope="module")
def planted() -> ctypes.CDLL:
    lib = library("planted", [(str(HERE / "planted.cpp"), [])])
    lib.planted_name.restype = ctypes.c_char_p
    return lib


def run(lib: ctypes.CDLL, name: str, order: int, resident: int, races: bool, seed: int) -> str:
    """Empty, or what is wrong."""
    names = [lib.planted_name(i).decode() for i in range(lib.planted_count())]
    assert names == NAMES
    blocks = 3 if name.split("/")[0] in ("last", "grid") else 1
    error = ctypes.create_string_buffer(256)
    got = lib.planted_run(names.index(name), N, blocks, order, resident, int(races), seed, error)
    expected = N // 2 if name.startswith("odd") else N * (N + 1) // 2
    return error.value.decode() or ("" if got == expected else f"wrong sum {got}")


@pytest.mark.parametrize("name", [n for n in NAMES if "/" not in n])
def test_correct_kernels_pass(planted: ctypes.CDLL, name: str) -> None:
    for order, resident, races, seed in itertools.product(ORDERS, (1, 3), (False, True), (1, 2)):
        assert run(planted, name, order, resident, races, seed) == ""


@pytest.mark.parametrize("name", [n for n in NAMES if "/" in n])
def test_planted_bugs_are_found(planted: ctypes.CDLL, name: str) -> None:
    for order, seed in itertools.product(ORDERS, (1, 2, 3)):
        assert run(planted, name, order, 3, True, seed) != "", "in every order, by the race check"
    if name in PLAIN:
        found = [run(planted, name, order, 3, False, seed) for order in ORDERS for seed in (1, 2)]
        assert any(found)


def test_what_is_wrong_is_said(planted: ctypes.CDLL) -> None:
    assert "lines" in run(planted, "tree/different_barriers", 0, 1, False, 1)
    assert "deadlock" in run(planted, "warp/early_exit", 0, 1, False, 1)
    assert "deadlock" in run(planted, "grid/a_block_leaves", 0, 1, False, 1)
    assert "not cooperative" in run(planted, "grid/not_cooperative", 0, 1, False, 1)
    assert "race: thread" in run(planted, "last/no_fence_before", 0, 1, True, 1)
    assert "out of bounds" in run(planted, "edge/read_behind", 0, 1, False, 1)
    assert "4 bytes before" in run(planted, "edge/write_before", 0, 1, False, 1)
    assert run(planted, "tree", 0, 1, True, 1) == "", "an error is gone once it was reported"
