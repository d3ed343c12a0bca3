"""Work that is left for a control thread is done by that thread, and now: its next tick is far away here."""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.control.thread import ControlCallbacks, ControlThread
from tests.connector.processes import wait_for

PATIENCE = 30.0
LOGGER = logging.getLogger(__name__)


def nothing(*_: object) -> None:
    """What an endpoint would do."""


CALLBACKS = ControlCallbacks(nothing, nothing, tick_seconds=1000.0)
COMMON: dict[str, Any] = {"callbacks": CALLBACKS, "key": None, "max_frame_bytes": 1 << 20}


def server() -> ControlThread:
    return ControlServer("127.0.0.1", **COMMON)


def client() -> ControlThread:
    return ControlClient(**COMMON)


@pytest.fixture(params=[server, client])
def control(request: pytest.FixtureRequest) -> Iterator[ControlThread]:
    control = request.param()
    thread = threading.Thread(target=control.run, name="control")
    thread.start()
    yield control
    control.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_work_of_any_thread_is_done_by_the_control_thread_at_once(control: ControlThread) -> None:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(100):
        control.call(lambda: done.put(threading.current_thread().name))
        assert done.get(timeout=PATIENCE) == "control"


def test_work_that_fails_is_logged_and_the_next_is_done(
    control: ControlThread, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def fail() -> None:
        raise KeyError("nothing")

    control.call(fail)
    control.call(done.set)
    assert done.wait(PATIENCE) and "one event failed" in caplog.text


def test_work_that_leaves_work_is_not_left_waiting_for_it(control: ControlThread) -> None:
    done = threading.Event()
    control.call(lambda: control.call(lambda: control.call(done.set)))
    assert done.wait(PATIENCE)


def test_a_connection_that_cannot_be_looked_at_hurts_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(fd: int) -> str:
        raise IndexError(fd)

    monkeypatch.setattr("sglang_mm_conn.control.server.peer_address", fail)
    server = ControlServer("127.0.0.1", **COMMON)
    thread = threading.Thread(target=server.run)
    thread.start()
    with socket.create_connection(("127.0.0.1", server.port)):
        wait_for(lambda: "one event failed" in caplog.text, "the connection is looked at")
    done = threading.Event()
    server.call(done.set)
    assert done.wait(PATIENCE)
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_work_that_was_left_before_the_end_is_done(control: ControlThread) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go_on.wait(PATIENCE)

    control.call(wait)
    assert begun.wait(PATIENCE)
    control.stop()
    control.call(done.set)
    go_on.set()
    assert done.wait(PATIENCE)


def test_what_one_piece_of_work_sends_leaves_before_the_next_is_done() -> None:
    """The next may be a long copy."""
    sent: list[str] = []
    control = ControlThread(lambda peer, batch: sent.append(peer), CALLBACKS, RateLimitedLog(LOGGER))
    control.call(lambda: control.send("first", b"frame"))
    control.call(lambda: sent.append("work"))
    control._run_work()
    assert sent == ["first", "work"]
