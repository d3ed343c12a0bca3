"""Work that is left for a control thread is done by that thread, and now: its next tick is far away here."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.control.thread import ControlThread

PATIENCE = 30.0


def nothing(*_: object) -> None:
    """What an endpoint would do."""


COMMON: dict[str, Any] = {
    "key": None, "max_frame_bytes": 1 << 20, "on_frame": nothing, "on_tick": nothing, "tick_seconds": 1000.0,
}  # fmt: skip


def server() -> ControlThread:
    return ControlServer("127.0.0.1", **COMMON)


def client() -> ControlThread:
    return ControlClient(**COMMON, on_connected=nothing, on_disconnected=nothing)


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
    control.call(lambda: {}["nothing"])
    control.call(done.set)
    assert done.wait(PATIENCE) and "one event failed" in caplog.text


def test_work_that_leaves_work_is_not_left_waiting_for_it(control: ControlThread) -> None:
    done = threading.Event()
    control.call(lambda: control.call(lambda: control.call(done.set)))
    assert done.wait(PATIENCE)
