"""The real runtime: what it costs was paid before the first request."""

from __future__ import annotations

import threading

import pytest

from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.memory import copying
from tests.connector.processes import wait_for


def test_what_large_copies_run_was_run_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[bool, bool]] = []
    copy_rows = copying._copy_rows

    def recorded(group: copying._Spans) -> list[tuple[int, int, int]]:
        left = copy_rows(group)
        assert not left
        copied.append((group.target_whole, group.source_whole))
        return left

    monkeypatch.setattr(copying, "_copy_rows", recorded)
    Runtime()
    assert sorted(copied) == [(False, True), (True, False)], "to scattered rows and from them"


def test_the_threads_of_a_pool_are_there_before_its_first_work() -> None:
    pool = Runtime().executor(3, "mm-conn-test")
    wait_for(lambda: sum(one.name.startswith("mm-conn-test") for one in threading.enumerate()) == 3, "three threads")
    pool.shutdown()


def test_a_pool_that_gets_too_few_threads_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would keep the process from ending."""
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if thread.name.startswith("mm-conn-few_2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    with pytest.raises(RuntimeError, match="can't start"):
        Runtime().executor(4, "mm-conn-few")
    wait_for(lambda: not any(one.name.startswith("mm-conn-few") for one in threading.enumerate()), "no thread is left")
