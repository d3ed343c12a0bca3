"""An idle scheduler sleeps while requests wait for embeddings, and whatever there is to do wakes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_mm_conn.control.wakeup import Wakeup
from sglang_mm_conn.sglang_plugin import idle
from sglang_mm_conn.sglang_plugin.idle import wake_on

FOR_EVER_MS = 60_000


class Ground:
    """A scheduler, as far as its sleep goes, and the other ends of its sockets."""

    def __init__(self, context: zmq.Context[Any], sleeper: Any = None) -> None:
        self.room_ends = Wakeup()
        self.waits = True
        ends = [context.socket(zmq.PAIR) for _ in range(4)]
        for number in (0, 1):
            ends[number].bind(f"inproc://{id(self)}-{number}")
            ends[number + 2].connect(f"inproc://{id(self)}-{number}")
        self.tokenizer, self.rpc = ends[:2]
        channels = SimpleNamespace(recv_from_tokenizer=ends[2], recv_from_rpc=ends[3])
        self.scheduler = SimpleNamespace(ipc_channels=channels, idle_sleeper=sleeper)

    def join(self) -> None:
        wake_on(self.scheduler, self.room_ends.fileno(), lambda: self.waits)

    def asleep(self) -> threading.Thread:
        """A thread that sleeps as the scheduler would."""
        thread = threading.Thread(target=self.scheduler.idle_sleeper.maybe_sleep, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


@pytest.fixture(autouse=True)
def only_events_end_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_LONGEST_MS", FOR_EVER_MS)


@pytest.mark.parametrize("event", ["a room ends", "a request", "a command"])
def test_a_scheduler_whose_requests_wait_sleeps_until_there_is_something_to_do(
    context: zmq.Context[Any], event: str
) -> None:
    ground = Ground(context)
    ground.join()
    thread = ground.asleep()
    thread.join(0.2)
    assert thread.is_alive(), "it does not spin"
    {
        "a room ends": ground.room_ends.notify,
        "a request": lambda: ground.tokenizer.send(b""),
        "a command": lambda: ground.rpc.send(b""),
    }[event]()
    thread.join(10)
    assert not thread.is_alive()


def test_a_room_that_ended_before_the_sleep_is_not_slept_over(context: zmq.Context[Any]) -> None:
    ground = Ground(context)
    ground.join()
    ground.room_ends.notify()
    thread = ground.asleep()
    thread.join(10)
    assert not thread.is_alive()


def test_what_wakes_nobody_is_looked_for_all_the_same(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "_LONGEST_MS", 1)
    ground = Ground(context)
    ground.join()
    thread = ground.asleep()
    thread.join(10)
    assert not thread.is_alive()


def test_where_no_request_waits_an_idle_scheduler_does_what_sglang_lets_it_do(context: zmq.Context[Any]) -> None:
    ground = Ground(context)
    ground.join()
    ground.waits = False
    thread = ground.asleep()
    thread.join(10)
    assert not thread.is_alive()


def test_the_sleep_that_the_user_asked_for_is_kept_and_ends_with_a_room(context: zmq.Context[Any]) -> None:
    own = SimpleNamespace(poller=zmq.Poller())
    ground = Ground(context, sleeper=own)
    ground.join()
    assert ground.scheduler.idle_sleeper is own
    assert not own.poller.poll(0)
    ground.room_ends.notify()
    assert own.poller.poll(0) == [(ground.room_ends.fileno(), zmq.POLLIN)]


def test_a_rank_that_receives_no_requests_does_not_sleep(context: zmq.Context[Any]) -> None:
    """It waits for the first rank's broadcast in every tick, and would not hear of it in a sleep of its own."""
    ground = Ground(context)
    ground.scheduler.ipc_channels = SimpleNamespace(recv_from_tokenizer=None, recv_from_rpc=None)
    ground.join()
    assert ground.scheduler.idle_sleeper is None
