"""An idle scheduler sleeps while requests wait for embeddings, and whatever there is to do wakes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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
        self.ends = ends = [context.socket(zmq.PAIR) for _ in range(4)]
        for number in (0, 1):
            ends[number].bind(f"inproc://{id(self)}-{number}")
            ends[number + 2].connect(f"inproc://{id(self)}-{number}")
        self.tokenizer, self.rpc = ends[:2]
        channels = SimpleNamespace(recv_from_tokenizer=ends[2], recv_from_rpc=ends[3])
        self.scheduler = SimpleNamespace(ipc_channels=channels, idle_sleeper=sleeper)

    def close(self) -> None:
        for end in self.ends:
            end.close(linger=0)
        self.room_ends.close()

    def join(self) -> None:
        wake_on(self.scheduler, self.room_ends.fileno(), lambda: self.waits)

    def asleep(self) -> threading.Thread:
        """A thread that sleeps as the scheduler would."""
        thread = threading.Thread(target=self.scheduler.idle_sleeper.maybe_sleep, daemon=True)
        thread.start()
        return thread


NewGround = Callable[..., Ground]


@pytest.fixture
def new_ground() -> Iterator[NewGround]:
    made: list[Ground] = []
    with zmq.Context() as context:

        def new(**options: Any) -> Ground:
            made.append(Ground(context, **options))
            return made[-1]

        yield new
        for ground in made:
            ground.close()


@pytest.fixture(autouse=True)
def only_events_end_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_LONGEST_MS", FOR_EVER_MS)


@pytest.mark.parametrize("event", ["a room ends", "a request", "a command"])
def test_a_scheduler_whose_requests_wait_sleeps_until_there_is_something_to_do(
    new_ground: NewGround, event: str
) -> None:
    ground = new_ground()
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


def test_a_room_that_ended_before_the_sleep_is_not_slept_over(new_ground: NewGround) -> None:
    ground = new_ground()
    ground.join()
    ground.room_ends.notify()
    thread = ground.asleep()
    thread.join(10)
    assert not thread.is_alive()


def test_what_wakes_nobody_is_looked_for_all_the_same(new_ground: NewGround, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_LONGEST_MS", 1)
    ground = new_ground()
    ground.join()
    thread = ground.asleep()
    thread.join(10)
    assert not thread.is_alive()


def test_where_no_request_waits_an_idle_scheduler_does_what_sglang_lets_it_do(new_ground: NewGround) -> None:
    ground = new_ground()
    ground.join()
    ground.waits = False
    thread = ground.asleep()
    thread.join(10)
    assert not thread.is_alive()


def test_the_sleep_that_the_user_asked_for_is_kept_and_ends_with_a_room(new_ground: NewGround) -> None:
    own = SimpleNamespace(poller=zmq.Poller())
    ground = new_ground(sleeper=own)
    ground.join()
    assert ground.scheduler.idle_sleeper is own
    assert not own.poller.poll(0)
    ground.room_ends.notify()
    assert own.poller.poll(0) == [(ground.room_ends.fileno(), zmq.POLLIN)]


def test_a_rank_that_receives_no_requests_does_not_sleep(new_ground: NewGround) -> None:
    """It waits for the first rank's broadcast in every tick, and would not hear of it in a sleep of its own."""
    ground = new_ground()
    ground.scheduler.ipc_channels = SimpleNamespace(recv_from_tokenizer=None, recv_from_rpc=None)
    ground.join()
    assert ground.scheduler.idle_sleeper is None
