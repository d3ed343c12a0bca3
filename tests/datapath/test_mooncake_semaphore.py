"""Permits of a link."""

from __future__ import annotations

import threading
import time

from sglang_mm_conn.datapath.mooncake.semaphore import FairSemaphore


def test_a_released_permit_goes_to_the_thread_that_has_waited_longest() -> None:
    permits = FairSemaphore(1)
    assert permits.acquire(wait=False)
    order: list[int] = []
    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=lambda number=number: order.append(number * permits.acquire(wait=True))))
        threads[-1].start()
        deadline = time.monotonic() + 30
        while len(permits._waiting) <= number:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for number, thread in enumerate(threads):
        permits.release()
        assert not permits.acquire(wait=False), "a thread that releases a permit queues behind the waiting ones"
        thread.join(30)
        assert order == list(range(number + 1))
    permits.release()
    assert permits.acquire(wait=False)
