"""Copies: every byte in its place, nothing beside it, nothing beyond the end of either side; and one wait for the GIL,
however many slices there are."""

from __future__ import annotations

import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm_conn.memory import copying
from sglang_mm_conn.memory.copying import HOLD_GIL_BELOW, LARGE, UNIT, Slice, copy_slices, unit_of


def bytes_of(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8)


@pytest.mark.parametrize("nbytes", [0, 1, 1000, HOLD_GIL_BELOW, HOLD_GIL_BELOW + 1, LARGE, LARGE + 3 * UNIT + 1])
def test_every_byte_gets_to_its_place_and_nothing_beside_it_changes(nbytes: int) -> None:
    source = bytes_of(nbytes + 20)
    target = torch.full((nbytes + 30,), 0xEE, dtype=torch.uint8)
    copy_slices([(target, 7, source, 3, nbytes)])
    assert torch.equal(target[7 : 7 + nbytes], source[3 : 3 + nbytes])
    assert bool((target[:7] == 0xEE).all()) and bool((target[7 + nbytes :] == 0xEE).all())


def test_a_part_of_a_tensor_is_counted_from_where_the_part_begins() -> None:
    whole, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    copy_slices([(target[50:60], 2, whole[20:40], 5, 8)])
    assert target.nonzero().flatten().tolist() == list(range(52, 60)) and target[52:60].tolist() == list(range(25, 33))


@pytest.mark.parametrize(
    ("at", "start", "nbytes"), [(0, 0, 11), (5, 0, 6), (0, 5, 6), (-1, 0, 2), (0, -1, 2), (0, 0, -1), (11, 0, 0)]
)
def test_a_copy_beyond_the_end_is_refused_and_moves_nothing(at: int, start: int, nbytes: int) -> None:
    source, target = torch.ones(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not go"):
        copy_slices([(target, 0, source, 0, 1), (target, at, source, start, nbytes)])
    assert not target.any()


def test_memory_that_is_not_the_hosts_is_refused_and_nothing_moves() -> None:
    target = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="from meta to cpu"):
        copy_slices([(target, 0, torch.empty(10, dtype=torch.uint8, device="meta"), 0, 10)])


# -- many slices -----------------------------------------------------------------------------------------------------

WINDOWS = {
    "scattered": lambda pool, window, at, start, nbytes: (pool, at, window, start, nbytes),
    "gathered": lambda pool, window, at, start, nbytes: (window, start, pool, at, nbytes),
}


def slices_of(way: str, pool: torch.Tensor, window: torch.Tensor, blocks: list[int], block_bytes: int) -> list[Slice]:
    return [
        WINDOWS[way](
            pool, window, block * block_bytes, at := number * block_bytes, min(block_bytes, window.numel() - at)
        )
        for number, block in enumerate(blocks)
    ]


@settings(deadline=None)
@given(
    way=st.sampled_from(sorted(WINDOWS)),
    block_bytes=st.sampled_from([1, 100, 4096, 5000, 3 << 14, 1 << 18, 1 << 20, (1 << 20) + 1, 7 << 17]),
    count=st.integers(1, 12),
    missing=st.integers(0, 2 << 20),
    ascending=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_a_window_in_blocks_anywhere_is_copied_to_the_byte(
    way: str, block_bytes: int, count: int, missing: int, ascending: bool, seed: int
) -> None:
    chance = random.Random(seed)
    blocks = chance.sample(range(2 * count), count)
    blocks = sorted(blocks) if ascending else blocks
    nbytes = max(1, count * block_bytes - missing % block_bytes)
    pool, window = bytes_of(2 * count * block_bytes), bytes_of(nbytes)
    slices = slices_of(way, pool, window, blocks, block_bytes)
    targets = {"scattered": pool, "gathered": window}
    expected = targets[way].clone()
    for _, at, source, start, length in slices:
        expected[at : at + length] = source[start : start + length]
    copy_slices(slices)
    assert torch.equal(targets[way], expected)


@pytest.mark.parametrize("way", sorted(WINDOWS))
def test_a_large_window_is_copied_to_the_byte(way: str) -> None:
    block_bytes = 1 << 20
    count = 3 + LARGE // block_bytes
    pool, window = bytes_of(2 * count * block_bytes), bytes_of(count * block_bytes - 12345)
    blocks = random.Random(0).sample(range(2 * count), count)
    copy_slices(slices_of(way, pool, window, blocks, block_bytes))
    arrived = torch.cat([pool[block * block_bytes :][:block_bytes] for block in blocks])[: window.numel()]
    assert torch.equal(arrived, window)


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 30), unit=st.sampled_from([1, 4096, 1 << 16]))
def test_slices_that_are_contiguous_on_neither_side_are_copied_to_the_byte(seed: int, unit: int) -> None:
    chance = random.Random(seed)
    count = 16
    source, target = bytes_of(2 * count * unit), bytes_of(2 * count * unit)
    ats, starts = chance.sample(range(2 * count), count), chance.sample(range(2 * count), count)
    expected = target.clone()
    for at, start in zip(ats, starts, strict=True):
        expected[at * unit : (at + 1) * unit] = source[start * unit : (start + 1) * unit]
    copy_slices((target, at * unit, source, start * unit, unit) for at, start in zip(ats, starts, strict=True))
    assert torch.equal(target, expected)


def test_slices_of_several_memories_each_get_to_their_own() -> None:
    sources, targets = [bytes_of(HOLD_GIL_BELOW) for _ in range(3)], [bytes_of(HOLD_GIL_BELOW) for _ in range(3)]
    half = HOLD_GIL_BELOW // 2
    copy_slices(
        (target, at, source, half - at, half)
        for target, source in zip(targets, sources, strict=True) for at in (half, 0)
    )  # fmt: skip
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, torch.cat([source[half:], source[:half]]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the copies that were made one by one."""
    lengths: list[int] = []

    def counted(move: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
        def call(target: int, source: int, nbytes: int) -> int:
            lengths.append(nbytes)
            return move(target, source, nbytes)

        return call

    for name in ("_memmove", "_memmove_holding_gil"):
        monkeypatch.setattr(copying, name, counted(getattr(copying, name)))
    return lengths


@pytest.mark.parametrize("way", sorted(WINDOWS))
@pytest.mark.parametrize("block_bytes", [1 << 14, 1 << 17, 7 << 17, 1 << 20])
def test_a_fragmented_window_is_one_copy_and_its_end_and_not_one_for_every_block(
    way: str, block_bytes: int, calls: list[int]
) -> None:
    pool, window = torch.zeros(128 * block_bytes, dtype=torch.uint8), bytes_of(64 * block_bytes - 5000)
    copy_slices(slices_of(way, pool, window, list(range(127, 0, -2)), block_bytes))
    assert len(calls) <= 1 and sum(calls) < block_bytes


@pytest.mark.parametrize("way", sorted(WINDOWS))
def test_fragmented_window_is_copied_once_and_other_threads_run_meanwhile(way: str) -> None:
    block_bytes = 1 << 20
    pool, window = bytes_of(128 * block_bytes), bytes_of(64 * block_bytes)
    slices = slices_of(way, pool, window, list(range(127, 0, -2)), block_bytes)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.0001)

    def ran_meanwhile() -> bool:
        """Another thread, in the middle of the copy: not only before it, or when the GIL was given up after it."""
        begin = time.monotonic()
        copy_slices(slices)
        quarter = (time.monotonic() - begin) / 4
        return any(begin + quarter < moment < begin + 3 * quarter for moment in list(ticks))

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        assert any(ran_meanwhile() for _ in range(20))
    finally:
        over.set()
        thread.join()
    tracemalloc.start()
    try:
        copy_slices(slices)
        assert tracemalloc.get_traced_memory()[1] < block_bytes
    finally:
        tracemalloc.stop()


def test_long_runs_of_small_blocks_are_copied_one_by_one(calls: list[int]) -> None:
    run = 1 << 20
    pool, window = torch.zeros(4 * run, dtype=torch.uint8), bytes_of(2 * run)
    copy_slices([(pool, 4096, window, 0, run), (pool, 2 * run, window, run, run)])
    assert calls == [run, run]


def test_slices_of_no_bytes_are_none() -> None:
    target, source = torch.zeros(2 << 20, dtype=torch.uint8), bytes_of(2 << 20)
    copy_slices([(target, 0, source, 0, 0), (target, 0, source, 1 << 20, 300 << 10), (target, 1 << 20, source, 7, 0)])
    assert torch.equal(target[: 300 << 10], source[1 << 20 :][: 300 << 10]) and not target[300 << 10 :].any()


def test_blocks_side_by_side_are_one_copy(calls: list[int]) -> None:
    pool, window = torch.zeros(8 << 18, dtype=torch.uint8), bytes_of(8 << 18)
    copy_slices(slices_of("scattered", pool, window, list(range(8)), 1 << 18))
    assert calls == [8 << 18] and torch.equal(pool, window)


def test_units_are_blocks_or_parts_of_them_that_are_not_much_smaller_than_wanted() -> None:
    def unit(block_bytes: int) -> int:
        return unit_of([(0, 5 * block_bytes, block_bytes), (block_bytes, 2 * block_bytes, 10)])

    assert unit(1 << 20) == UNIT
    assert unit(UNIT) == UNIT
    assert unit(7 << 17) == 7 << 16
    assert unit(3 << 10) == 3 << 10
    prime = (1 << 20) + 7
    assert unit(prime) == prime
    assert unit_of([(3, 5, LARGE)]) == UNIT


@pytest.mark.parametrize("count", [1, 2])
def test_copying_makes_no_threads(count: int) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    half = 32 << 20
    source = torch.zeros(2 * half, dtype=torch.uint8)  # torch's own threads are made here
    target = torch.empty_like(source)
    slices: dict[int, list[Slice]] = {
        1: [(target, 0, source, 0, 2 * half)],
        2: [(target, 0, source, half, half), (target, half, source, 0, half)],
    }
    seen: list[int] = []

    def work() -> None:
        before = threads()
        copy_slices(slices[count])
        seen.extend([before, threads()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] == seen[1]
