"""The wake-up between threads: no notification is lost, and one that is pending is not repeated."""

from __future__ import annotations

import os
import select
import threading
from collections import deque

import pytest

from sglang_mm_conn.control.wakeup import Wakeup


def heard(wakeup: Wakeup, seconds: float = 0.0) -> bool:
    return bool(select.select([wakeup.fileno()], [], [], seconds)[0])


def test_it_is_heard_until_it_is_cleared_and_again_after_that() -> None:
    wakeup = Wakeup()
    assert not heard(wakeup)
    wakeup.notify()
    wakeup.notify()
    assert heard(wakeup)
    wakeup.clear()
    assert not heard(wakeup)
    wakeup.clear()  # for nothing
    wakeup.notify()
    assert heard(wakeup)
    wakeup.close()
    wakeup.notify()  # changes nothing any more


def test_no_work_that_was_added_before_a_ring_is_left_undone() -> None:
    wakeup, work, done = Wakeup(), deque[int](), 0

    def add_work() -> None:
        for number in range(20_000):
            work.append(number)
            wakeup.notify()

    threads = [threading.Thread(target=add_work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while done < 60_000:
        assert heard(wakeup, 60.0), f"{len(work)} pieces of work wait and nobody is told"
        wakeup.clear()
        while work:
            work.popleft()
            done += 1
    for thread in threads:
        thread.join()
    wakeup.close()


def test_a_finalizer_may_notify_in_the_middle_of_a_notify(monkeypatch: pytest.MonkeyPatch) -> None:
    wakeup, write = Wakeup(), os.eventfd_write

    def finalized_meanwhile(fd: int, value: int) -> None:
        wakeup._notified = False
        monkeypatch.setattr(os, "eventfd_write", write)
        wakeup.notify()
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", finalized_meanwhile)
    wakeup.notify()
    assert heard(wakeup)
    wakeup.close()


def test_a_second_close_leaves_a_file_that_has_the_number_now_alone() -> None:
    wakeup = Wakeup()
    wakeup.close()
    reader, writer = os.pipe()
    try:
        os.write(writer, b"12345678")
        wakeup.close()
        wakeup.clear()
        assert os.read(reader, 8) == b"12345678"
    finally:
        os.close(reader)
        os.close(writer)
