"""Warm memory: used again, but only after the last tensor over it is gone, whatever kind of reference that is."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import dlpack

from sglang_mm_conn.memory.buffer_cache import SMALLEST, BufferCache, lease

NBYTES = 3 << 20


@pytest.fixture
def warm() -> BufferCache:
    return BufferCache(64 << 20)


def test_memory_that_nobody_refers_to_is_used_again(warm: BufferCache) -> None:
    first = warm.tensor(NBYTES)
    at = first.data_ptr()
    assert warm.idle_bytes == 0
    del first
    assert warm.idle_bytes >= NBYTES
    assert warm.tensor(NBYTES - 1000).data_ptr() == at
    assert warm.tensor(NBYTES).is_contiguous()


class Owner:
    """An object of a caller that holds the rows in a cycle: only the garbage collector frees it."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.me = self


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "the tensor": lambda rows: rows,
    "a view of some rows": lambda rows: rows[100:200],
    "another dtype": lambda rows: rows.view(torch.bfloat16).reshape(-1, 8),
    "detached": lambda rows: rows.detach(),
    "a parameter": lambda rows: torch.nn.Parameter(rows.view(torch.float32)),
    "a NumPy array": lambda rows: rows.numpy()[5:10],
    "a buffer of a NumPy array": lambda rows: memoryview(rows.numpy())[5:10],
    "the storage": lambda rows: rows.untyped_storage(),
    "a DLPack capsule": lambda rows: dlpack.to_dlpack(rows),
    "a tensor of a DLPack capsule": lambda rows: torch.from_dlpack(rows.numpy()),
    "a cycle": Owner,
    "a result of split": lambda rows: rows.split(1000)[7],
    "a tensor on the same storage": lambda rows: torch.empty(0, dtype=torch.uint8).set_(rows.untyped_storage()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_is_reused_only_after_the_last_tensor_over_it_is_gone(warm: BufferCache, kind: str) -> None:
    rows = warm.tensor(NBYTES)
    rows.fill_(1)
    at = rows.data_ptr()
    kept = KINDS[kind](rows)
    del rows
    gc.collect()
    others = [warm.tensor(NBYTES) for _ in range(3)]
    for other in others:
        other.fill_(2)
        assert not at <= other.data_ptr() < at + NBYTES
    assert warm.idle_bytes == 0
    assert np.frombuffer((__import__("ctypes").c_uint8 * NBYTES).from_address(at), dtype=np.uint8).max() == 1
    del kept
    gc.collect()
    assert warm.tensor(NBYTES).data_ptr() == at


def test_rows_that_a_module_shared_or_pickled_are_a_copy_and_the_memory_comes_back(warm: BufferCache) -> None:
    rows = warm.tensor(NBYTES)
    rows.fill_(1)
    copy = pickle.loads(pickle.dumps(rows))
    part = rows[:100]
    rows.share_memory_()  # torch moves the bytes to shared memory of its own, under all tensors on this storage
    gc.collect()
    warm.tensor(NBYTES).fill_(2)
    assert bool((rows == 1).all()) and bool((copy == 1).all()) and bool((part == 1).all())


def test_what_lies_idle_is_bounded_and_the_oldest_goes_first() -> None:
    warm = BufferCache(8 << 20)
    tensors = [warm.tensor(4 << 20) for _ in range(3)]
    places = [tensor.data_ptr() for tensor in tensors]
    while tensors:
        tensors.pop(0)
    warm.trim()
    assert warm.idle_bytes == 8 << 20
    assert [warm.tensor(4 << 20).data_ptr() for _ in range(1)] == [places[2]]


def test_memory_is_rounded_up_by_a_quarter_at_most() -> None:
    warm = BufferCache(1 << 30)
    for nbytes in (SMALLEST, 300_000, 1 << 20, (5 << 20) + 1, (9 << 20) + 1, 100_000_001):
        rows = warm.tensor(nbytes)
        assert rows.numel() == nbytes
        before = warm.idle_bytes
        del rows
        assert nbytes <= warm.idle_bytes - before <= max(nbytes * 5 // 4, nbytes + (2 << 20))


def test_small_results_and_a_limit_of_0_leave_nothing_idle() -> None:
    for warm, nbytes in ((BufferCache(1 << 30), SMALLEST - 1), (BufferCache(0), NBYTES)):
        assert warm.tensor(nbytes).numel() == nbytes
        assert warm.idle_bytes == 0


def test_many_threads_never_share_a_buffer(warm: BufferCache) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(100):
            rows = warm.tensor(SMALLEST + turn * 4096)
            rows[::4096] = number
            if not bool((rows[::4096] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_finalizer_that_runs_while_the_cache_is_locked_does_not_wait_for_it(warm: BufferCache) -> None:
    cycle: Any = Owner(warm.tensor(NBYTES))
    with warm._lock:
        del cycle
        gc.collect()  # as it may happen at any allocation under the lock
    assert warm.idle_bytes >= NBYTES


def test_a_lease_is_over_once_and_only_when_the_last_view_is_gone() -> None:
    ends: list[int] = []
    rows = lease(np.zeros(100, dtype=np.uint8), lambda: ends.append(1))
    part = rows[50:].view(torch.float16)
    del rows
    assert not ends
    del part
    assert ends == [1]
