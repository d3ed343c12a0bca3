"""Copies: every byte in its place, nothing beside it, nothing beyond the end of either side."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from sglang_mm_conn.memory.copying import HOLD_GIL_BELOW, copy_bytes


@pytest.mark.parametrize("nbytes", [0, 1, 1000, HOLD_GIL_BELOW, HOLD_GIL_BELOW + 1])
def test_every_byte_gets_to_its_place_and_nothing_beside_it_changes(nbytes: int) -> None:
    source = torch.randint(0, 255, (nbytes + 20,), dtype=torch.uint8)
    target = torch.full((nbytes + 30,), 0xEE, dtype=torch.uint8)
    copy_bytes(target, 7, source, 3, nbytes)
    assert torch.equal(target[7 : 7 + nbytes], source[3 : 3 + nbytes])
    assert bool((target[:7] == 0xEE).all()) and bool((target[7 + nbytes :] == 0xEE).all())


def test_a_part_of_a_tensor_is_counted_from_where_the_part_begins() -> None:
    whole, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    copy_bytes(target[50:60], 2, whole[20:40], 5, 8)
    assert target.nonzero().flatten().tolist() == list(range(52, 60)) and target[52:60].tolist() == list(range(25, 33))


@pytest.mark.parametrize(
    ("at", "start", "nbytes"), [(0, 0, 11), (5, 0, 6), (0, 5, 6), (-1, 0, 2), (0, -1, 2), (0, 0, -1), (11, 0, 0)]
)
def test_a_copy_beyond_the_end_is_refused_and_moves_nothing(at: int, start: int, nbytes: int) -> None:
    source, target = torch.ones(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not go"):
        copy_bytes(target, at, source, start, nbytes)
    assert not target.any()


def test_copying_makes_no_threads() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    source = torch.zeros(64 << 20, dtype=torch.uint8)  # torch's own threads are made here
    target = torch.empty_like(source)
    seen: list[int] = []

    def work() -> None:
        before = threads()
        copy_bytes(target, 0, source, 0, source.numel())
        seen.extend([before, threads()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] == seen[1]
